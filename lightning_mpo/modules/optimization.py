"""The LightningModule of reinforcement learning: policy, reference model and objective."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_mpo.checks import at_least, not_below, temperatures
from lightning_mpo.errors import UserError
from lightning_mpo.modules.fitting import check_fit, warn_of_untrained_heads
from lightning_mpo.modules.gradients import clip_gradients, gradient_norms
from lightning_mpo.modules.loader import SlotLoader
from lightning_mpo.modules.parallel import build_policy, check_strategy
from lightning_mpo.modules.precision import check_precision
from lightning_mpo.modules.rollout_setup import check_policy
from lightning_mpo.modules.saved_state import keep_trained, mend_epoch_end
from lightning_mpo.modules.source import RolloutSource
from lightning_mpo.modules.stage import Stage
from lightning_mpo.modules.trainer import callbacks_of, data_of
from lightning_mpo.modules.trainer_options import check_trainer
from lightning_mpo.modules.trial import (
    has_vectors,
    make_optimizer,
    trained_parts,
    try_optimizer,
)
from lightning_mpo.modules.update_metrics import UpdateMetrics
from lightning_mpo.objective.kl import KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.policies.base import Policy, check_schedule, parameter_groups
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.scores import Denominators, ScoreRequest, TokenScores
from lightning_mpo.types import Experience, Rollout, trim


class PolicyOptimization(Stage):
    """Updates a policy on rollouts that the `RolloutLoop` callback provides.

    Args:
        policy: the trained model; its weights are loaded in `configure_model`.
        objective: the algorithm.
        temperature: of sampling and of every log-prob in training.
        optimizer: of the trained weights.
        scheduler: of the learning rate, stepped per update; None: constant.
        learning_rates: of `mtp` or `critic`, if they differ from the optimizer's rate.
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
        temperatures("model", temperature=temperature)
        part_rates: dict[str, Any] = dict(learning_rates or {})
        not_below("model.learning_rates", 0, **part_rates)
        at_least("model", 1, most=10**9, score_tokens=score_tokens)
        self.policy, self.objective = policy, objective
        self.temperature = temperature
        self.optimizer, self.scheduler = optimizer, scheduler
        self.learning_rates = part_rates
        self.score_tokens = score_tokens
        self.keep_reference = objective.needs_reference or objective.support.from_reference
        """Whether to build a reference; callbacks that score with it set this in `setup`."""
        self.reference_every = 1 if objective.needs_reference else 0
        """Rollouts from one scoring by the reference to the next; 0: none."""
        self.strict_loading = False  # checkpoints hold trained weights only
        self.metrics = UpdateMetrics()
        """Metrics of the present update."""
        self._rollout_metrics: dict[str, float] = {}
        """Metrics of the last rollout, which are logged with each of its updates."""
        self._progress_bar_names = {"kl/reference"}
        self._stop_requested = False
        """Whether the run stops at the end of the present update."""
        self.skip_idle_updates = True
        """False: step even if the gradient is zero, to measure the memory of a step."""
        self._idle = False
        """Whether the gradient of the present update is zero."""

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer)
        check_precision(self.trainer.precision)
        check_trainer(self.trainer)
        if stage == "fit":
            self._try_optimizer()
        check_policy(self.policy, self.objective)
        # prompts are rendered, and fit the model
        connect_tokenizer = getattr(data_of(self.trainer), "connect", None)
        if connect_tokenizer is not None:
            connect_tokenizer(self.policy.tokenizer)
            self._check_fit(stage)
        for remark in self.policy.remarks:
            rank_zero_info(remark)

    def _try_optimizer(self) -> None:
        try_optimizer(
            self.optimizer,
            self.scheduler,
            parts=trained_parts(self.policy, self.objective.request),
            vectors=has_vectors(self.policy),
            learning_rates=self.learning_rates,
            updates=self.trainer.max_steps,
        )

    def _check_fit(self, stage: str) -> None:
        """Refuse prompts and responses that are longer than the model's positions."""
        data: Any = data_of(self.trainer)
        max_new_tokens = getattr(self.source, "max_new_tokens", None)
        if max_new_tokens is None or not hasattr(data, "longest_prompt"):
            return
        rows = [*data.validation_rows, *(data.splits.train if stage == "fit" else ())]
        check_fit(self.policy, data, rows, max_new_tokens)

    def configure_model(self) -> None:
        freeze = partial(self.policy.freeze_unused, self.objective.request)
        build_policy(self, self.policy, reference=self.keep_reference, freeze=freeze)
        for term in self.objective.terms:
            if remark := term.remark(self.policy):
                rank_zero_warn(remark)
        if self.trainer.ckpt_path is None:
            warn_of_untrained_heads(self.policy, self.objective)

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
            "no rollout callback: add `lightning_mpo.callbacks.RolloutLoop` to the trainer's "
            "callbacks"
        )

    def train_dataloader(self) -> SlotLoader:
        return SlotLoader(self.source.slots_per_epoch)

    def scorer(self) -> Scorer:
        """Return a scorer with this policy, temperature and precision."""
        exact = self.trainer.precision == "32-true"
        precision = None if exact else self.trainer.precision_plugin.forward_context
        return Scorer(self.policy, self.temperature, self.score_tokens, precision)

    def score(
        self, rollout: Rollout, *, request: ScoreRequest | None = None, reference: bool = False
    ) -> TokenScores:
        """Score a whole rollout without gradient, in passes of bounded size."""
        return self.scorer().score(rollout, request=request, reference=reference)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the loss, times the micro-batches and the ranks.

        The factor undoes the averages that Lightning takes over micro-batches, and DDP over ranks.
        """
        # log-probs and values of the policy
        experience: Experience = trim(batch["micro_batch"])
        denominators: Denominators = batch["denominators"]
        scores = self.policy.score(
            experience.rollout,
            experience.mask_BT,
            temperature=self.temperature,
            request=self.objective.request,
        )
        # loss
        loss, metrics = self.objective.loss(experience, scores, denominators)
        self._idle = self.skip_idle_updates and self.objective.nothing_to_learn(denominators)
        idle_and_count = (torch.tensor(float(self._idle)), torch.ones(()))
        self.metrics.add(metrics | {"optim/idle": idle_and_count})
        # loss of the weights: divided, so that it counts once in an update over all ranks
        weights_loss, metrics = self.objective.weights_loss(self.policy)
        self.metrics.add(metrics)
        if weights_loss is not None:
            shares = self.trainer.accumulate_grad_batches * self.trainer.world_size
            loss = loss + weights_loss / shares
        if batch["last_of_update"]:
            self._log_update()
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Delay a stop that was requested within an update until the update ends.

        A checkpoint holds no gradients.
        """
        requested = self._stop_requested or self.trainer.should_stop
        self.trainer.should_stop = requested and batch["last_of_update"]
        self._stop_requested = requested and not batch["last_of_update"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # zero gradients would move weights by momentum and decay; weights without one stay
        if self._idle:
            optimizer.zero_grad(set_to_none=True)
        norms = gradient_norms(self.policy.parts(), self.global_step)
        for part, norm in norms.items():
            name = "optim/grad_norm" if part == "policy" else f"optim/grad_norm_{part}"
            self.log(name, norm, on_step=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip policy, heads and critic apart."""
        clip_gradients(self.policy.parts(), gradient_clip_val, gradient_clip_algorithm)

    def _log_update(self) -> None:
        """Log the metrics of an update once, over its micro-batches and ranks."""
        means = self.metrics.finish(lambda sums: self.over_ranks(sums.to(self.device)))
        means = self.objective.finish(means)
        for name, value in (self._rollout_metrics | means).items():
            self.log(name, value, on_step=True, prog_bar=name in self._progress_bar_names)

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Return sums of all ranks' values."""
        if self.trainer.world_size == 1:
            return sums
        return self.trainer.strategy.reduce(sums, reduce_op="sum")

    def log_with_update(
        self, metrics: dict[str, float], progress_bar: Collection[str] = ()
    ) -> None:
        """Log metrics of a rollout with each of its updates; between updates a metric has no step.

        Args:
            metrics: values by name.
            progress_bar: names that the progress bar shows as well.
        """
        self._rollout_metrics |= metrics
        self._progress_bar_names |= set(progress_bar)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.source.validate(self, batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.source.validate(self, batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        return self.source.predict(self, batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained(checkpoint, self.policy)
        checkpoint["rollout_metrics"] = dict(self._rollout_metrics)
        checkpoint["progress_bar"] = sorted(self._progress_bar_names)
        checkpoint["mtp"] = self.policy.describe_heads()
        penalty = self.objective.term(KLPenalty)
        if penalty is not None:
            checkpoint["kl_coefficient"] = penalty.controller.coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mend_epoch_end(checkpoint)
        self.policy.check_heads(checkpoint.get("mtp"), "the checkpoint")
        if self.trainer.state.fn != "fit":
            return
        self._rollout_metrics = checkpoint["rollout_metrics"]
        self._progress_bar_names |= set(checkpoint["progress_bar"])
        penalty = self.objective.term(KLPenalty)
        if penalty is not None:
            penalty.controller.restore(checkpoint["kl_coefficient"])
