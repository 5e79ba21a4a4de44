"""Measures rollouts and updates apart: they are limited by different things."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.rollout.events import RolloutEvent


class Throughput(RolloutCallback):
    """Logs seconds and response tokens per second of rollouts and updates, by rank 0's clock."""

    def __init__(self) -> None:
        self._update_seconds = 0.0
        self._tokens = 0
        self._started: float | None = None
        self.seconds = {"rollout": 0.0, "prepare": 0.0, "update": 0.0}
        """Totals of the run."""

    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        metrics = {
            "throughput/rollout_tokens_per_s": event.sampled_tokens
            / max(event.sample_seconds, 1e-9),
            "time/rollout_s": event.sample_seconds,
            "time/prepare_s": event.prepare_seconds,
        }
        if self._update_seconds:
            metrics["throughput/update_tokens_per_s"] = self._tokens / self._update_seconds
            metrics["time/updates_s"] = self._update_seconds
        module.log_with_update(metrics, progress_bar=("throughput/rollout_tokens_per_s",))
        self.seconds["rollout"] += event.sample_seconds
        self.seconds["prepare"] += event.prepare_seconds
        self._update_seconds, self._tokens = 0.0, 0
        self._started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # `RolloutLoop`'s hook is first in the list, so the update alone follows
        self._started = time.perf_counter()
        if "micro_batch" in batch:
            self._tokens += int(batch["micro_batch"].rollout.response_mask_BT.sum())

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._started is not None:
            spent = time.perf_counter() - self._started
            self._update_seconds += spent
            self.seconds["update"] += spent

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "update_seconds": self._update_seconds,
            "tokens": self._tokens,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = dict(state_dict["seconds"])
        self._update_seconds, self._tokens = state_dict["update_seconds"], state_dict["tokens"]
