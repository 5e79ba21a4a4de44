"""A progress bar that moves while tokens are sampled."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from lightning_mpo.checks import at_least
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.rollout.events import RolloutEvent

SHORT = {
    "reward/mean": "reward",
    "reward/accuracy": "accuracy",
    "kl/reference": "kl",
    "throughput/rollout_tokens_per_s": "tokens/s",
    "memory/peak_mib": "peak MiB",
    "val/pass_at_1": "val pass@1",
}


class RolloutProgressBar(RichProgressBar, RolloutCallback):
    """Lightning's rich bar with a second line for rollouts and short names of metrics."""

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        at_least("RolloutProgressBar", 0, refresh_rate=refresh_rate)
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._rollout_task: Any = None

    def on_rollout_start(
        self, trainer: L.Trainer, module: PolicyOptimization, sequences: int, limit: int
    ) -> None:
        if self.progress is not None:
            self._rollout_task = self.progress.add_task("  rollout", total=sequences, visible=True)
            self._sequences = sequences
            self._tokens = 0

    def on_rollout_tokens(self, tokens: int, running: int) -> None:
        if self.progress is None or self._rollout_task is None:
            return
        self._tokens += tokens
        self.progress.update(
            self._rollout_task,
            completed=self._sequences - running,
            description=f"  rollout {self._tokens} tokens",
        )
        self.progress.refresh()

    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        if self.progress is not None and self._rollout_task is not None:
            self.progress.remove_task(self._rollout_task)
            self._rollout_task = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._count_updates(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._count_updates(trainer, pl_module)

    def _count_updates(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Count updates of the whole run; Lightning counts micro-batches of this process."""
        if self.progress is None or self.train_progress_bar_id is None:
            return
        if isinstance(module, PolicyOptimization) and trainer.max_steps > 0:
            total, updates = trainer.max_steps, trainer.global_step
            self.progress.update(self.train_progress_bar_id, total=total, completed=updates)

    def _get_train_description(self, current_epoch: int) -> str:
        """Count updates, or a warm-up's epochs, of which Lightning would show the bound as "-2"."""
        counts = (
            "Updates"
            if isinstance(self.trainer.lightning_module, PolicyOptimization)
            else f"Epoch {current_epoch}"
        )
        return counts.ljust(10)  # as wide as "Validation", which takes turns with it

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {SHORT.get(name, name): value for name, value in metrics.items()}
