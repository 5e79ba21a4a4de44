"""Writes the completions of `predict` to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_mpo.errors import UserError


class Predictions(BasePredictionWriter):
    """Writes a record per completion to `completions/predictions.jsonl` in the run folder.

    A record holds the columns of its row, `prompt`, `completion`, `finished` (it ended by itself),
    and where rows have targets, `target` and `reward`. Lines are written one by one and unbuffered:
    a run that is killed leaves whole ones. With several processes each writes a file of its own.

    Args:
        path: another file to write; None: the one in the run folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._count = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path, self._count = self._path(trainer), 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        except OSError as error:
            raise UserError(
                f"predictions cannot be written to {path}: {error.strerror}; "
                + (
                    "name another file"
                    if self.path
                    else "set `trainer.default_root_dir` to another folder"
                )
            ) from error

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
        lines = [(json.dumps(record, ensure_ascii=False) + "\n").encode() for record in prediction]
        try:
            with self._path(trainer).open("ab", buffering=0) as file:
                complete = all(file.write(line) == len(line) for line in lines)
        except OSError as error:
            raise UserError(
                f"predictions cannot be written to {self._path(trainer)}: {error.strerror}"
            ) from error
        if not complete:
            raise UserError(
                f"predictions cannot be written to {self._path(trainer)}: the disk is full"
            )
        self._count += len(prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        print(f"predicted  {self._count} completions, in {self._path(trainer)}")

    def _path(self, trainer: L.Trainer) -> Path:
        path = Path(
            self.path or Path(trainer.default_root_dir) / "completions" / "predictions.jsonl"
        )
        return (
            path
            if trainer.world_size == 1
            else path.with_stem(f"{path.stem}-{trainer.global_rank}")
        )
