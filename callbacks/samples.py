"""Prints completions of rollouts, and writes them to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from lightning_mpo.checks import at_least
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.trainer import is_fast_dev_run
from lightning_mpo.rollout.events import RolloutEvent


class Samples(RolloutCallback):
    """Appends completions to `completions/rollouts.jsonl`, and prints a few as a table.

    A run that begins starts the file afresh; one that goes on from a checkpoint cuts it to what it
    held then. Under `fast_dev_run` the file is left as it is.

    Args:
        every: rollouts between two looks.
        count: completions a look.
        show: print the table as well.
    """

    def __init__(self, every: int = 10, count: int = 4, show: bool = True) -> None:
        at_least("Samples", 1, every=every, count=count)
        self.every, self.count, self.show = every, count, show
        self._path: Path | None = None
        self._size = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not is_fast_dev_run(trainer):
            self._path = Path(trainer.default_root_dir) / "completions" / "rollouts.jsonl"

    @rank_zero_only
    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        if event.counter % self.every:
            return
        rollout, rewards = event.experience.rollout, event.scores.rewards_B.tolist()
        rows = len(rollout.texts)
        chosen = range(0, rows, max(1, rows // self.count))[: self.count]
        records = [
            {
                "rollout": event.counter,
                "step": trainer.global_step,
                "prompt": rollout.rows[i].prompt,
                "completion": rollout.texts[i],
                "target": rollout.rows[i].target,
                "reward": rewards[i],
            }
            for i in chosen
        ]
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if self.show:
            self._print(event.counter, records)

    def state_dict(self) -> dict[str, Any]:
        return {
            "bytes": self._path.stat().st_size
            if self._path is not None and self._path.is_file()
            else 0
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._size = state_dict["bytes"]

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        size, self._size = self._size, 0
        if self._path is not None and self._path.is_file():
            os.truncate(self._path, min(size, self._path.stat().st_size))

    @staticmethod
    def _print(counter: int, records: list[dict[str, object]]) -> None:
        from rich import get_console
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            "prompt", "completion", "target", "reward", title=f"rollout {counter}", show_lines=False
        )
        for record in records:
            texts = (
                escape(str(record[key]).strip().replace("\n", "⏎"))
                for key in ("prompt", "completion", "target")
            )
            cut = [text if len(text) <= 160 else text[:79] + " … " + text[-79:] for text in texts]
            table.add_row(*cut, f"{record['reward']:.2f}")
        get_console().print(table)  # that of the progress bar, which it is printed above
