"""The LightningModule of reinforcement learning: policy, reference model and objective."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_mpo.checks import at_least, not_below, positive
from lightning_mpo.errors import UserError
from lightning_mpo.functional.sharded_rows import full_weight
from lightning_mpo.modules.fitting import check_fit
from lightning_mpo.modules.loader import SlotLoader
from lightning_mpo.modules.parallel import build_policy, check_strategy
from lightning_mpo.modules.saved_state import keep_trained, mend_epoch_end
from lightning_mpo.modules.source import RolloutSource
from lightning_mpo.modules.stage import Stage
from lightning_mpo.modules.trainer import callbacks_of, data_of
from lightning_mpo.modules.trainer_options import check_trainer
from lightning_mpo.modules.trial import has_vectors, make_optimizer, try_optimizer
from lightning_mpo.objective.kl import KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies.base import Policy, check_schedule, parameter_groups
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.scores import Denominators, Metrics, ScoreRequest, TokenScores
from lightning_mpo.types import Experience, Rollout, trim


class PolicyOptimization(Stage):
    """Updates a policy on rollouts that the `RolloutLoop` callback provides.

    Args:
        policy: what is trained; its weights are loaded in `configure_model`.
        objective: the algorithm.
        temperature: of sampling and of every log-prob in training.
        optimizer: of the trained weights.
        scheduler: of the learning rate, stepped per update; None: constant.
        learning_rates: of parts of the policy, `mtp` or `critic`, where they differ from the optimizer's own.
        score_tokens: tokens (padding included) of one no-grad scoring pass.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        temperature: float = 1.0,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        scheduler: LRSchedulerCallable | None = None,
        learning_rates: dict[str, float] | None = None,
        score_tokens: int = 16_384,
    ) -> None:
        super().__init__()
        positive("model", temperature=temperature)
        rates: dict[str, Any] = dict(learning_rates or {})
        not_below("model.learning_rates", 0, **rates)
        at_least("model", 1, most=10**9, score_tokens=score_tokens)
        self.policy = policy
        self.objective = objective
        self.temperature = temperature
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.learning_rates = rates
        self.score_tokens = score_tokens
        self.keep_reference = objective.needs_reference or objective.support.from_reference
        """Whether the reference is kept at all; callbacks that score it themselves ask for that."""
        self.reference_every = 1 if objective.needs_reference else 0
        """Rollouts from one scoring by the reference to the next; 0: none."""
        self.strict_loading = False  # checkpoints hold what is trained, not what is reloaded
        self._sums: Metrics = {}
        self._carried: dict[str, float] = {}
        self._progress_bar = {"kl/reference"}
        self._stop_asked = False
        self.skip_idle_updates = True
        """False: also step where nothing can be learnt, so that a step's memory can be measured."""
        self._idle = False
        """Whether the update under way has nothing to learn from."""

    # --- set-up ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer)
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise UserError(
                f"`trainer.precision: {self.trainer.precision}` trains half-precision weights, in which updates at RL "
                "learning rates round away; use `bf16-mixed`, or `policy.dtype: bfloat16` with `policy.lora`"
            )
        if self.trainer.precision in (
            "64-true",
            "transformer-engine",
            "transformer-engine-float16",
        ):
            raise UserError(
                f"`trainer.precision: {self.trainer.precision}` is not supported: sampler and trainer would compute "
                "differently; use `32-true` or `bf16-mixed`"
            )
        if self.trainer.precision == "16-mixed":
            raise UserError(
                "`trainer.precision: 16-mixed` scales losses and leaves out the updates whose gradients overflow; use "
                "`bf16-mixed`, or `32-true`"
            )
        check_trainer(self.trainer)
        if stage == "fit":
            self._try_optimizer()
        self.policy.check(self.objective.request)
        self.objective.support.check(self.policy.vocabulary)
        self.objective.surrogate.check(self.policy.vocabulary)
        support = self.objective.support
        if isinstance(support, TopK) and support.slots == self.policy.vocabulary:
            rank_zero_warn(
                f"`TopK.k` is the whole vocabulary of {self.policy.vocabulary} tokens: nothing is left out"
            )
        if self.objective.actions.needs_texts:
            self.objective.actions.check(self.policy.token_texts)
        connect = getattr(data_of(self.trainer), "connect", None)
        if connect is not None:
            connect(self.policy.tokenizer)
            self._check_fit(stage)
        for remark in self.policy.remarks:
            rank_zero_info(remark)

    def _try_optimizer(self) -> None:
        policy, request = self.policy, self.objective.request
        parts = ["policy"]
        parts += ["mtp"] if getattr(policy, "mtp", None) is not None and request.future else []
        parts += (
            ["critic"] if getattr(policy, "critic", None) is not None and request.values else []
        )
        try_optimizer(
            self.optimizer,
            self.scheduler,
            parts=tuple(parts),
            vectors=has_vectors(policy),
            learning_rates=self.learning_rates,
            updates=self.trainer.max_steps,
        )

    def _check_fit(self, stage: str) -> None:
        """Refuse prompts and responses that the model has no places for."""
        data: Any = data_of(self.trainer)
        longest = getattr(self.source, "max_new_tokens", None)
        if longest is None or not hasattr(data, "longest_prompt"):
            return
        rows = [*data.validation_rows, *(data.splits.train if stage == "fit" else ())]
        check_fit(self.policy, data, rows, longest)

    def configure_model(self) -> None:
        freeze = partial(self.policy.freeze_unused, self.objective.request)
        build_policy(self, self.policy, reference=self.keep_reference, freeze=freeze)
        for term in self.objective.terms:
            if remark := term.remark(self.policy):
                rank_zero_warn(remark)
        if (
            self.objective.actions.future
            and "mtp" in self.policy.cold_parts
            and self.trainer.ckpt_path is None
        ):
            rank_zero_warn(
                "`policy.mtp` start untrained, so that the log-ratios of future offsets say little; warm them up with "
                "`HeadWarmup` first (-c quickstart_mtp_warmup) and give `policy.checkpoint`"
            )

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(
            self.optimizer, parameter_groups(self.policy, self.learning_rates)
        )
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        check_schedule(optimizer, self.policy, self.learning_rates)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @property
    def source(self) -> RolloutSource:
        """The callback that provides rollouts."""
        for callback in callbacks_of(self.trainer):
            if isinstance(callback, RolloutSource):
                return callback
        raise UserError(
            "no rollout callback: add `lightning_mpo.callbacks.Rollout` to the trainer's callbacks"
        )

    def train_dataloader(self) -> SlotLoader:
        return SlotLoader(self.source.slots_per_epoch)

    # --- scoring --------------------------------------------------------------------------------------------------

    def scorer(self) -> Scorer:
        """Return what scores rollouts with this policy at this precision."""
        exact = self.trainer.precision == "32-true"
        precision = None if exact else self.trainer.precision_plugin.forward_context
        return Scorer(self.policy, self.temperature, self.score_tokens, precision)

    def score(
        self, rollout: Rollout, *, request: ScoreRequest | None = None, reference: bool = False
    ) -> TokenScores:
        """Score a whole rollout without gradient, in passes of bounded size."""
        return self.scorer().score(rollout, request=request, reference=reference)

    # --- updates --------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the loss, scaled against Lightning's and DDP's own averaging."""
        experience: Experience = trim(batch["micro_batch"])
        denominators: Denominators = batch["denominators"]
        scores = self.policy.score(
            experience.rollout,
            experience.mask_BT,
            temperature=self.temperature,
            request=self.objective.request,
        )
        loss, metrics = self.objective.loss(experience, scores, denominators)
        self._idle = self.skip_idle_updates and self.objective.nothing_to_learn(denominators)
        self._add(metrics | {"optim/idle": (torch.tensor(float(self._idle)), torch.ones(()))})
        weights_loss, metrics = self.objective.weights_loss(self.policy)
        self._add(metrics)
        if weights_loss is not None:  # a share, so that an update over all ranks holds it once
            shares = self.trainer.accumulate_grad_batches * self.trainer.world_size
            loss = loss + weights_loss / shares
        if batch["last_of_update"]:
            self._log_update()
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Let a stop that was asked for within an update wait for its end: gradients are in no checkpoint."""
        asked = self._stop_asked or self.trainer.should_stop
        self.trainer.should_stop = asked and batch["last_of_update"]
        self._stop_asked = asked and not batch["last_of_update"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._idle:  # optimisers pass over weights without a gradient; zeros would move them by momentum and decay
            optimizer.zero_grad(set_to_none=True)
        self._check_gradients()

    def _check_gradients(self) -> None:
        for part, weights in self.policy.parts().items():
            norm = full_weight(
                torch.nn.utils.get_total_norm(
                    [weight.grad for weight in weights if weight.grad is not None]
                )
            )
            self.log(
                "optim/grad_norm" if part == "policy" else f"optim/grad_norm_{part}",
                norm,
                on_step=True,
            )
            if not torch.isfinite(norm):
                raise UserError(
                    f"the gradient norm of the {part} is {norm.item()} at update {self.global_step}: lower the "
                    "learning rate, or set `trainer.gradient_clip_val`; the last checkpoint is from before this update"
                )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip policy, heads and critic apart: one's large gradient must not shrink another's step."""
        for weights in self.policy.parts().values():
            if gradient_clip_val is None or not gradient_clip_val > 0:
                return
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(weights, gradient_clip_val)
            else:
                torch.nn.utils.clip_grad_norm_(weights, gradient_clip_val)

    def _add(self, metrics: Metrics) -> None:
        for name, (value, weight) in metrics.items():
            total, weights = self._sums.get(name, (torch.zeros(()), torch.zeros(())))
            self._sums[name] = (total + value.detach().cpu(), weights + weight.detach().cpu())

    def _log_update(self) -> None:
        """Log the metrics of an update once, summed over its micro-batches and ranks."""
        names = sorted(self._sums)
        sums = self.over_ranks(
            torch.stack([torch.stack(self._sums[name]) for name in names]).to(self.device)
        )
        means = {
            name: value if name.startswith("loss/") else value / max(weight, 1e-8)
            for name, (value, weight) in zip(names, sums.tolist(), strict=True)
        }
        means = self.objective.finish(means)
        for name, value in (self._carried | means).items():
            self.log(name, value, on_step=True, prog_bar=name in self._progress_bar)
        self._sums = {}

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Return sums of all ranks' values."""
        return (
            self.trainer.strategy.reduce(sums, reduce_op="sum")
            if self.trainer.world_size > 1
            else sums
        )

    def log_with_update(
        self, metrics: dict[str, float], progress_bar: Collection[str] = ()
    ) -> None:
        """Log a rollout's numbers with each of its updates: what is logged in between is attributed to no step."""
        self._carried |= metrics
        self._progress_bar |= set(progress_bar)

    # --- the other verbs ------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.source.validate(self, batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.source.validate(self, batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        return self.source.predict(self, batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained(checkpoint, self.policy)
        checkpoint["rollout_metrics"] = dict(self._carried)
        checkpoint["progress_bar"] = sorted(self._progress_bar)
        checkpoint["mtp"] = self.policy.describe_heads()
        penalty = self.objective.term(KLPenalty)
        if penalty is not None:
            checkpoint["kl_coefficient"] = penalty.controller.coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mend_epoch_end(checkpoint)
        self.policy.check_heads(checkpoint.get("mtp"), "the checkpoint")
        if self.trainer.state.fn != "fit":
            return
        self._carried = checkpoint["rollout_metrics"]
        self._progress_bar |= set(checkpoint["progress_bar"])
        penalty = self.objective.term(KLPenalty)
        if penalty is not None:
            penalty.controller.restore(checkpoint["kl_coefficient"])
