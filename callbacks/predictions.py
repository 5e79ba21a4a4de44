"""Writes what `predict` samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter


class Predictions(BasePredictionWriter):
    """Writes a record per completion to `completions/predictions.jsonl` in the run folder, batch by batch.

    A record holds `prompt`, `completion`, `target` and `reward`. With several processes each writes a file of its own.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        with self._path(trainer).open("a") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in prediction)

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.jsonl"
        return Path(trainer.default_root_dir) / "completions" / name
