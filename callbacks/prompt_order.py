"""Writes down which prompts a run takes, and when."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L

from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.trainer import is_fast_dev_run
from lightning_mpo.resume.comparison import PROMPTS
from lightning_mpo.rollout.events import RolloutEvent


class PromptOrder(RolloutCallback):
    """Appends the prompts of each rollout to `prompts.jsonl` in the run folder.

    Each process has its own file.
    """

    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        if is_fast_dev_run(trainer):
            return
        rows = event.experience.rollout.rows
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        record = {"rollout": event.counter, "rank": trainer.global_rank, "prompts": prompts}
        name = PROMPTS if trainer.world_size == 1 else f"rank{trainer.global_rank}-{PROMPTS}"
        with (Path(trainer.default_root_dir) / name).open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
