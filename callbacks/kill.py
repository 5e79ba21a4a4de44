"""Kills its own process at a chosen point, to test resumes."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

import lightning as L

from lightning_mpo.checks import at_least, one_of
from lightning_mpo.errors import UserError
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.resume.saving import AtomicCheckpointIO, save_whole
from lightning_mpo.storage import PART, Disk

Phase = Literal["rollout", "micro-batch", "update", "validation", "write", "rename", "saved"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class KillAt(RolloutCallback):
    """Sends SIGKILL to its own process at the n-th event of a kind, which no handler can soften.

    Args:
        phase: "rollout": a step of the sampler; "micro-batch": the gradient of a part of an update
            is there; "update": the weights have moved and no checkpoint knows; "validation": a
            batch of held-out prompts is done; "write": half a block of a checkpoint is written;
            "rename": a checkpoint is written and has not got its name (a folder is renamed twice,
            to make way and to take its place); "saved": it has, and the update's metrics are not
            logged.
        count: which event of that kind, from 1.
        rank: the process that is killed.
    """

    def __init__(self, phase: Phase, count: int, rank: int = 0) -> None:
        at_least("KillAt", 0, rank=rank)
        at_least("KillAt", 1, count=count)
        one_of("KillAt", PHASES, phase=phase)
        self.phase, self.count, self.rank = phase, count, rank
        self.left = count
        self._mine = True

    @classmethod
    def from_text(cls, text: str) -> KillAt:
        """Return the callback for `PHASE:N`, the form of `--kill`.

        Raises:
            UserError: the phase is unknown, or N is not a number from 1 on.
        """
        phase, _, count = text.partition(":")
        if phase not in PHASES or not re.fullmatch(r"0*[1-9][0-9]{0,11}", count):
            raise UserError(
                f"`--kill` must be one of {', '.join(PHASES)} and a number, such as update:4, got "
                f"{text!r}"
            )
        return cls(phase, int(count))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._mine = trainer.global_rank == self.rank
        if self.phase in ("write", "rename", "saved"):
            if not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
                save_whole(trainer.strategy, None)
            checkpoint_io = trainer.strategy.checkpoint_io
            if isinstance(checkpoint_io, AtomicCheckpointIO):
                checkpoint_io.disk = _DyingDisk(self)

    def passed(self, phase: Phase) -> bool:
        """Count an event; return whether it is the one."""
        if phase == self.phase and self._mine:
            self.left -= 1
        return phase == self.phase and self._mine and self.left == 0

    def event(self, phase: Phase) -> None:
        """Count an event and die if it is the one."""
        if self.passed(phase):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_rollout_tokens(self, tokens: int, running: int) -> None:
        self.event("rollout")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.event("micro-batch" if trainer.fit_loop._should_accumulate() else "update")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        loader: int = 0,
    ) -> None:
        self.event("validation")


class CountEvents(KillAt):
    """Kills nothing and writes down how many events of each kind a run had.

    Args:
        path: of the JSON file, which is written when the run ends.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("saved", 1)  # a kind that needs the disk
        self.path = path
        self.counts = dict.fromkeys(PHASES, 0)

    def passed(self, phase: Phase) -> bool:
        self.counts[phase] += self._mine
        return False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._mine:
            self.path.write_text(json.dumps(self.counts) + "\n")


class _DyingDisk(Disk):
    """Asks before each write and each renaming, and when a checkpoint has its name."""

    def __init__(self, killer: KillAt) -> None:
        self.killer = killer

    def open(self, path: Path) -> IO[bytes]:
        return cast("IO[bytes]", _DyingFile(super().open(path), self.killer))

    def rename(self, source: Path, target: Path) -> None:
        self.killer.event("rename")
        super().rename(source, target)
        if source.name.endswith(PART):
            self.killer.event("saved")


class _DyingFile:
    def __init__(self, file: IO[bytes], killer: KillAt) -> None:
        self.file, self.killer = file, killer

    def write(self, data: Any) -> int:
        if self.killer.passed("write"):
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(data)

    def __enter__(self) -> _DyingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
