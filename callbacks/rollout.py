"""Rolls out before the first update of each rollout and hands micro-batches to the training loop."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mpo.data.base import PromptDataModule, seeded_generator
from lightning_mpo.errors import UserError
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.resume import gather_ranks, place, plain_state
from lightning_mpo.modules.source import RolloutCallback, RolloutEvent, RolloutSource
from lightning_mpo.rewards.base import Reward, completions_of, score_all
from lightning_mpo.rollout.admission import admit
from lightning_mpo.rollout.base import Sampler
from lightning_mpo.rollout.evaluation import Decoding, Tally, decodings
from lightning_mpo.rollout.local import LocalSampler
from lightning_mpo.rollout.parity import check_parity
from lightning_mpo.rollout.schedule import Schedule
from lightning_mpo.scores import Denominators
from lightning_mpo.supports import FullVocabulary
from lightning_mpo.types import Experience, PromptBatch, take_rows, to_device
from lightning_mpo.types import Rollout as RolloutData


class Rollout(RolloutCallback, RolloutSource):
    """Samples completions, scores them and spends the result in updates.

    Args:
        rewards: judgements of completions, summed by their weights.
        prompts: prompts of a rollout, over all processes.
        completions: G, completions per prompt.
        max_new_tokens: longest response.
        minibatches: updates in one pass over a rollout.
        epochs: passes over a rollout.
        sampler: how responses are drawn; None: in process, on the policy's own weights.
        seed: of the sampling; None: `seed_everything`.
        validation_completions: completions per validation prompt; pass@1 is their mean.
        parity_gate: compare sampler and trainer before the first update, and refuse to train where they disagree.
    """

    def __init__(
        self,
        rewards: Sequence[Reward] = (),
        prompts: int = 8,
        completions: int = 4,
        max_new_tokens: int = 256,
        minibatches: int = 1,
        epochs: int = 1,
        sampler: Sampler | None = None,
        seed: int | None = None,
        validation_completions: int = 1,
        parity_gate: bool = True,
    ) -> None:
        self.rewards = list(rewards)
        self.prompts, self.completions = prompts, completions
        self.max_new_tokens = max_new_tokens
        self.minibatches, self.epochs = minibatches, epochs
        self.sampler = sampler or LocalSampler()
        self._seed = seed
        self.validation_completions = validation_completions
        self.parity_gate = parity_gate
        self.counter = 0
        """Rollouts finished or under way."""
        self.schedule: Schedule | None = None
        self._experience: Experience | None = None
        self._plan: list[list[torch.Tensor]] = []
        self._denominators: list[Denominators] = []
        self._tallies: dict[str, Tally] = {}
        self._gate_passed = False

    @property
    def seed(self) -> int:
        """Seed of the sampling."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed

    # --- set-up ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PolicyOptimization):
            return
        if not isinstance(trainer.datamodule, PromptDataModule):  # type: ignore[attr-defined]
            raise UserError("`data` must be a `PromptDataModule`, which serves prompts to the rollout")
        if not self.rewards:
            raise UserError("`rollout.rewards` is empty: name at least one reward, such as `MathAnswer`")
        if self.max_new_tokens < 1:
            raise UserError(f"`rollout.max_new_tokens` must be at least 1, got {self.max_new_tokens}")
        pl_module.objective.advantage.check(self.completions)
        if stage == "fit":
            self._setup_fit(trainer, pl_module)

    def _setup_fit(self, trainer: L.Trainer, module: PolicyOptimization) -> None:
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                "`GradientAccumulationScheduler` changes the number of micro-batches, which is fixed within a rollout; "
                "set `trainer.accumulate_grad_batches` instead"
            )
        trainer.callbacks.sort(key=lambda callback: callback is not self)  # type: ignore[attr-defined]  # first in each slot
        quick = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if quick:
            trainer.accumulate_grad_batches = 1
            for callback in trainer.checkpoint_callbacks:  # Lightning 2.6.6 writes last.ckpt nevertheless
                callback.save_last = False  # type: ignore[attr-defined]
        self.schedule = Schedule(
            self.prompts,
            self.completions,
            minibatches=1 if quick else self.minibatches,
            epochs=1 if quick else self.epochs,
            micro_batches=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
        )
        if self.schedule.updates > 1 and module.objective.surrogate.on_policy:
            rank_zero_warn(
                f"`{type(module.objective.surrogate).__name__}` is meant for one update per rollout, and there are "
                f"{self.schedule.updates}: later ones are biased, as nothing weighs what older weights sampled; set "
                "`rollout.minibatches` and `rollout.epochs` to 1, or take a surrogate with ratios"
            )
        limit = trainer.limit_train_batches
        if not quick and isinstance(limit, int) and limit % self.schedule.slots:
            raise UserError(
                f"`trainer.limit_train_batches` ({limit}) must be a multiple of a rollout's {self.schedule.slots} "
                "micro-batches"
            )
        if isinstance(limit, float) and limit != 1.0:
            raise UserError("`trainer.limit_train_batches` must be a whole number of micro-batches, not a share")
        every = trainer.val_check_interval
        if isinstance(every, int) and not quick:
            if trainer.check_val_every_n_epoch is not None:
                raise UserError(
                    "`trainer.val_check_interval` counts updates over the whole run: set "
                    "`trainer.check_val_every_n_epoch: null` with it"
                )
            trainer.val_check_interval = every * self.schedule.micro_batches  # Lightning counts micro-batches
        self._rollouts_per_epoch = max(1, -(-len(trainer.datamodule.splits.train) // self.prompts))  # type: ignore[attr-defined]
        rank_zero_info(f"rollout    {self.schedule.describe()}")
        rank_zero_info(f"objective  {module.objective.describe()}")

    @property
    def slots_per_epoch(self) -> int:
        return self._rollouts_per_epoch * self._need_schedule().slots

    def _need_schedule(self) -> Schedule:
        if self.schedule is None:
            raise RuntimeError("the rollout schedule exists from `setup` on")
        return self.schedule

    # --- training -------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, PolicyOptimization):
            return
        schedule = self._need_schedule()
        slot = trainer.fit_loop.epoch_loop.batch_idx % schedule.slots
        if slot == 0 or self._experience is None:
            self._collect(trainer, pl_module)
        update, micro = divmod(slot, schedule.micro_batches)
        experience = self.experience
        rows = self._plan[update][micro].to(experience.rewards_B.device)
        # after a resume the experience is on the CPU
        batch["micro_batch"] = to_device(take_rows(experience, rows), pl_module.device)
        batch["denominators"] = self._denominators[update]
        batch["last_of_update"] = micro == schedule.micro_batches - 1
        batch["first_update"] = update == 0
        batch["last_of_rollout"] = slot == schedule.slots - 1

    def _collect(self, trainer: L.Trainer, module: PolicyOptimization) -> None:
        """Roll out: prompts, samples, rewards, experience, and the plan of the updates."""
        module.zero_grad(set_to_none=True)  # gradients of the last update are otherwise alive during the rollout
        schedule = self._need_schedule()
        listeners = [callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback)]  # type: ignore[attr-defined]
        for callback in listeners:
            callback.on_rollout_start(trainer, module, schedule.rows, self.max_new_tokens)
        started = time.perf_counter()
        rollout = self._sample(trainer, module, listeners)
        sampled = time.perf_counter()
        if self.parity_gate and not self._gate_passed:
            self._check_parity(trainer, module, rollout)
        scores = score_all(self.rewards, completions_of(rollout))
        generator = seeded_generator(self.seed, self.counter, trainer.global_rank, 1)
        experience = module.experience(rollout, scores, generator, counter=self.counter, updates=schedule.updates)
        self._experience = experience
        tokens_B = rollout.attention_mask_BL.sum(1)
        self._plan = schedule.plan(rollout.group_B, tokens_B, generator)
        self._denominators = self._sum_denominators(trainer, module, experience)
        event = RolloutEvent(self.counter, experience, scores, sampled - started, time.perf_counter() - sampled)
        self.counter += 1
        for callback in listeners:
            callback.on_rollout_end(trainer, module, event)
        self._log(module, event)

    def _sample(
        self, trainer: L.Trainer, module: PolicyOptimization, listeners: Sequence[RolloutCallback]
    ) -> RolloutData:
        schedule, data, rank = self._need_schedule(), trainer.datamodule, trainer.global_rank  # type: ignore[attr-defined]
        rows = data.training_rows(self.counter, self.prompts)
        rows = rows[rank * schedule.local_prompts : (rank + 1) * schedule.local_prompts]

        def progress(tokens: int, running: int) -> None:
            for callback in listeners:
                callback.on_rollout_tokens(tokens, running)

        with trainer.precision_plugin.forward_context():  # outside training_step autocast is not active
            rollout = self.sampler.sample(
                module.policy,  # type: ignore[arg-type]
                data.encode(rows),
                self.completions,
                support=module.objective.support,
                temperature=module.temperature,
                max_new_tokens=self.max_new_tokens,
                generator=seeded_generator(self.seed, self.counter, rank),
                progress=progress,
            )
        return admit(rollout, module.objective.support, module.policy.vocabulary)

    def _check_parity(self, trainer: L.Trainer, module: PolicyOptimization, rollout: RolloutData) -> None:
        exact = trainer.precision == "32-true" and all(p.dtype == torch.float32 for p in module.policy.parameters())
        with trainer.precision_plugin.forward_context():
            parity = check_parity(module.policy, rollout, temperature=module.temperature, exact=exact)
        rank_zero_info(f"parity     sampler against trainer: mean {parity.mean:.2g}, max {parity.max:.2g} nats")
        self._gate_passed = True

    def _sum_denominators(
        self, trainer: L.Trainer, module: PolicyOptimization, experience: Experience
    ) -> list[Denominators]:
        """One all-reduce for the whole rollout: a denominator per update and loss term."""
        device = experience.rewards_B.device
        local = [
            module.objective.denominators(take_rows(experience, torch.cat(update).to(device))) for update in self._plan
        ]
        sums = torch.stack([torch.stack([part.actions, part.tokens]) for part in local])
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        return [Denominators(actions, tokens) for actions, tokens in sums]

    def _log(self, module: PolicyOptimization, event: RolloutEvent) -> None:
        sums = event.sums(module.policy.end_tokens)
        totals = torch.tensor(list(sums.values()), dtype=torch.float64)
        if module.trainer.world_size > 1:
            totals = module.trainer.strategy.reduce(totals, reduce_op="sum")
        metrics = {name: value / max(count, 1.0) for name, (value, count) in zip(sums, totals.tolist(), strict=True)}
        rows, mean = totals[0, 1].item(), metrics["reward/mean"]
        variance = (metrics.pop("reward/square") - mean**2) * rows / max(rows - 1, 1.0)
        metrics |= {"reward/std": max(variance, 0.0) ** 0.5, "rollout/counter": float(event.counter)}
        module.log_with_update(metrics, progress_bar=("reward/mean", "reward/accuracy"))

    @property
    def experience(self) -> Experience:
        if self._experience is None:
            raise RuntimeError("there is no rollout yet")
        return self._experience

    # --- validation and prediction --------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tallies = {}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for prefix, tally in self._tallies.items():
            for name, value in tally.compute().items():
                pl_module.log(f"val/{prefix}{name}", value, prog_bar=prefix + name == "pass@1", sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def _draw(
        self, module: PolicyOptimization, prompts: PromptBatch, batch_idx: int, decoding: Decoding
    ) -> RolloutData:
        with module.trainer.precision_plugin.forward_context():
            return self.sampler.sample(
                module.policy,  # type: ignore[arg-type]
                prompts,
                decoding.completions,
                support=decoding.support,
                temperature=module.temperature,
                max_new_tokens=self.max_new_tokens,
                generator=seeded_generator(self.seed, batch_idx, module.trainer.global_rank, 2),
                greedy=decoding.greedy,
            )

    def validate(self, module: PolicyOptimization, prompts: PromptBatch, batch_idx: int) -> None:
        for prefix, decoding in decodings(module.objective.support, self.validation_completions).items():
            rollout = self._draw(module, prompts, batch_idx, decoding)
            tally = self._tallies.setdefault(prefix, Tally((1,)))
            tally.add(rollout, score_all(self.rewards, completions_of(rollout)), decoding.completions)

    def predict(self, module: PolicyOptimization, prompts: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        rollout = self._draw(module, prompts, batch_idx, Decoding(FullVocabulary(), self.validation_completions))
        scores = score_all(self.rewards, completions_of(rollout))
        return [
            {"prompt": row.prompt, "completion": text, "target": row.target, "reward": reward}
            for row, text, reward in zip(rollout.rows, rollout.texts, scores.rewards_B.tolist(), strict=True)
        ]

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"counter": self.counter, "gate_passed": self._gate_passed}
        if self._experience is not None:
            state["experience"] = plain_state(self._experience)
            state["plan"] = self._plan
            state["denominators"] = [(part.actions, part.tokens) for part in self._denominators]
        return {"ranks": gather_ranks(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks, (rank, world) = state_dict["ranks"], place()
        if len(ranks) != world:
            raise UserError(f"the checkpoint was saved by {len(ranks)} processes and cannot be resumed by {world}")
        state_dict = ranks[rank]
        self.counter = state_dict["counter"]
        self._gate_passed = state_dict["gate_passed"]
        if "experience" in state_dict:
            tensors = dict(state_dict["experience"])
            rollout = RolloutData(**tensors.pop("rollout"))
            self._experience = Experience(rollout=rollout, **tensors)
            self._plan = state_dict["plan"]
            self._denominators = [Denominators(*pair) for pair in state_dict["denominators"]]
