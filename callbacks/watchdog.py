"""Warns of silent failures of training, each with the option that changes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mpo.checks import at_least, positive
from lightning_mpo.errors import UserError
from lightning_mpo.metrics.alarms import WatchdogLimits, alarms
from lightning_mpo.metrics.trends import DIVERGENCES, Trends
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.rollout.diagnosis import diagnose, is_flat, sampler_gap
from lightning_mpo.rollout.events import RolloutEvent

HELD_OUT = "val/pass_at_1"
FIGURES = (
    "policy/entropy",
    "reward/answered",
    "reward/mean",
    "reward/std",
    "rollout/groups_flat",
    "rollout/length",
    "rollout/repetition",
    "rollout/truncated",
    "support/could_not_stop",
    *DIVERGENCES,
)
"""Logged metrics that the rules read, once per rollout."""


class Watchdog(RolloutCallback):
    """Warns of rollouts that teach nothing and of runs that go wrong; stops at NaN.

    Each warning is one sentence: a figure, its likely cause and an option. docs/watchdog.md lists
    them. A warning of a rollout is given once until its condition has gone away, and one of the
    course of a run once. All figures are logged anyway.

    Args:
        patience: rollouts in a row without any reward variance before the warning.
        ratio_tolerance: mean |log ratio| (nats) allowed in the first update of a rollout, where it
            should be 0.
        sampler_tolerance: mean difference (nats) allowed between the log-probs of sampler and
            trainer, where the trainer scores a rollout before its updates.
        limits: limits of the rules over the course of a run.
    """

    def __init__(
        self,
        patience: int = 2,
        ratio_tolerance: float = 0.05,
        sampler_tolerance: float = 0.1,
        limits: WatchdogLimits | None = None,
    ) -> None:
        at_least("Watchdog", 1, patience=patience)
        positive("Watchdog", ratio_tolerance=ratio_tolerance, sampler_tolerance=sampler_tolerance)
        self.patience = patience
        self.ratio_tolerance, self.sampler_tolerance = ratio_tolerance, sampler_tolerance
        self.limits = limits or WatchdogLimits()
        self.trends = Trends(self.limits.window, self.limits.hacking or 0.0)
        """Figures of the run so far."""
        self._flat = 0
        """Rollouts in a row without a gradient."""
        self._idle_rate = 0
        """Rollouts in a row whose last update had the learning rate 0."""
        self._independent: list[str] = []
        """Metrics of the present rollout that training does not optimise."""
        self._raised: set[str] = set()

    def _tell(self, cause: str, holds: bool, sentence: str) -> None:
        if not holds:
            self._raised.discard(cause)
        elif cause not in self._raised:
            self._raised.add(cause)
            rank_zero_warn(sentence)

    def _tell_alarms(self) -> None:
        """Warn of the course of the run; a cause that was told is not told again."""
        for cause, sentence in alarms(self.trends, self.limits).items():
            self._tell(cause, True, sentence)

    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        # the rollout by itself
        self._flat = self._flat + 1 if is_flat(event) else 0
        for cause, holds, sentence in diagnose(event, self._flat, self.patience):
            self._tell(cause, holds, sentence)
        gap = sampler_gap(event)
        if gap is not None:
            self._tell(
                "sampler",
                gap > self.sampler_tolerance,
                f"sampler and trainer differ by {gap:.3g} nats a token in the mean: the sampler "
                "has other weights or another precision than the trainer; check `rollout.sampler` "
                "and `trainer.precision`, or set `objective.correction`",
            )
        # metrics that training does not optimise
        scores = event.scores
        unweighted = [name for name, weight in scores.weights.items() if weight == 0]
        self._independent = [f"reward/{name}" for name in unweighted]
        if scores.decided_B.any():
            self._independent.append("reward/accuracy")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not isinstance(pl_module, PolicyOptimization) or not batch.get("last_of_update"):
            return
        metrics = trainer.callback_metrics
        off = metrics.get("ratio/abs_log")
        if off is not None and batch.get("first_update"):
            self._tell(
                "ratio",
                bool(off > self.ratio_tolerance),
                f"the first update of a rollout has ratios off 1 (mean |log ratio| {off:.3g} "
                "nats): the scoring pass differs from the training pass; set dropout to 0 "
                "(`policy.lora.dropout`) and one `trainer.precision`",
            )
        if batch.get("last_of_rollout"):
            self._check_rate(trainer)
            self._add_figures(metrics)
            self._tell_alarms()

    def _add_figures(self, metrics: Mapping[str, Any]) -> None:
        """Enter the figures of the rollout that was just spent, unless no reward judged it."""
        if float(metrics.get("reward/judged", 0.0)) > 0:
            names = [name for name in (*FIGURES, *self._independent) if name in metrics]
            figures = {name: float(metrics[name]) for name in names}
            self.trends.add(figures, [name for name in self._independent if name in figures])

    def _check_rate(self, trainer: L.Trainer) -> None:
        """Warn of a learning rate of 0 over several rollouts."""
        rates = [
            float(group["lr"])
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]
        self._idle_rate = 0 if any(rates) else self._idle_rate + 1
        self._tell(
            "rate",
            self._idle_rate >= self.limits.window,
            f"the learning rate was 0 in the last {self._idle_rate} rollouts, so nothing is "
            "learnt: check the steps of `model.scheduler` against `trainer.max_steps`",
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = trainer.callback_metrics.get(HELD_OUT)
        if value is not None and not trainer.sanity_checking:
            self.trends.compare(HELD_OUT, float(value))
            self._tell_alarms()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for name, weight in pl_module.named_parameters():
            if weight.grad is not None and not torch.isfinite(weight.grad).all():
                raise UserError(
                    f"the gradient of `{name}` is not finite at update {trainer.global_step}; "
                    "nothing was changed: lower the learning rate, set "
                    "`trainer.gradient_clip_val`, or look at the rewards in `completions/`"
                )

    def state_dict(self) -> dict[str, Any]:
        return {
            "flat": self._flat,
            "raised": sorted(self._raised),
            "idle_rate": self._idle_rate,
            "independent": list(self._independent),
            "trends": self.trends.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._flat, self._raised = state_dict["flat"], set(state_dict["raised"])
        if "trends" in state_dict:  # a checkpoint of an earlier version has none
            self._idle_rate = state_dict["idle_rate"]
            self._independent = list(state_dict["independent"])
            self.trends.load_state_dict(state_dict["trends"])
