"""Writes the completions of `predict` to a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_mpo.checks import not_below
from lightning_mpo.errors import UserError
from lightning_mpo.sampling.reveal_order import LEGEND, order_lines


class Predictions(BasePredictionWriter):
    """Writes a record per completion to `completions/predictions.jsonl` in the run folder.

    A record holds the columns of its row, `prompt`, `completion`, `finished` (it ended by itself),
    and where rows have targets, `target` and `reward`. Of a masked policy it also holds `tokens`
    and `steps`, the order in which these were revealed. Lines are written one by one and
    unbuffered: a run that is killed leaves whole ones. With several processes each writes a file of
    its own.

    Args:
        path: another file to write; None: the one in the run folder.
        show_order: number of completions of a masked policy whose order of revealed tokens is
            printed; 0: none.
    """

    def __init__(self, path: str | None = None, show_order: int = 0) -> None:
        super().__init__(write_interval="batch")
        not_below("Predictions", 0, show_order=show_order)
        self.path, self.show_order = path, show_order
        self._count = 0
        self._shown: list[dict[str, Any]] = []
        """The first records, whose order is printed."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path, self._count, self._shown = self._path(trainer), 0, []
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
        self._shown += prediction[: max(0, self.show_order - len(self._shown))]

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        print(f"predicted  {self._count} completions, in {self._path(trainer)}")
        if self.show_order and trainer.is_global_zero:
            print_orders(self._shown)

    def _path(self, trainer: L.Trainer) -> Path:
        path = Path(
            self.path or Path(trainer.default_root_dir) / "completions" / "predictions.jsonl"
        )
        return (
            path
            if trainer.world_size == 1
            else path.with_stem(f"{path.stem}-{trainer.global_rank}")
        )


def print_orders(records: Sequence[dict[str, Any]]) -> None:
    """Print the order in which the tokens of completions were revealed.

    Args:
        records: from a masked policy, with `tokens` and `steps`.
    """
    if not records or "steps" not in records[0]:
        print("order      none to show: a causal policy draws tokens from left to right")
        return
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    encoding = sys.stdout.encoding or "utf-8"
    lines = [f"order      {LEGEND}"]
    for record in records:
        prompt = " ".join(str(record["prompt"]).split())
        lines += ["", prompt if len(prompt) <= 80 else prompt[:38] + " ... " + prompt[-37:]]
        lines += order_lines(record["tokens"], record["steps"], color=color)
    print("\n".join(lines).encode(encoding, "replace").decode(encoding))
