"""Reports which process the others wait for, instead of hanging silently."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch.distributed as dist

from lightning_mpo.checks import positive
from lightning_mpo.errors import UserError
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization

EXIT_CODE = 75
"""Of a process that gave up waiting: the system's code for "try again later"."""


@dataclass(frozen=True)
class Beat:
    """The last report of a process.

    Args:
        count: phases it has begun: who has begun the fewest is waited for.
        phase: what it does.
        seconds: since that phase began, or last moved.
        silent: seconds since it said so, by the clock of whoever reads it.
    """

    count: int
    phase: str
    seconds: float
    silent: float = 0.0


def describe(beats: Sequence[Beat | None], patience: float) -> str:
    """Return a sentence on the processes that others wait for, and their phases.

    Args:
        beats: by rank; None: never heard of.
        patience: seconds of silence after which a process counts as gone.

    Example:
        >>> describe([Beat(8, "all-reduce", 40.2), Beat(7, "reward function", 41.4)], 30.0)
        'rank 1: reward function, 41 s; waiting for it: rank 0 (all-reduce, 40 s)'
    """
    gone = [rank for rank, beat in enumerate(beats) if beat is None or beat.silent > patience]
    there = {rank: beat for rank, beat in enumerate(beats) if beat is not None and rank not in gone}
    behind = sorted(there, key=lambda rank: (there[rank].count, -there[rank].seconds))
    fewest = there[behind[0]].count if behind else 0
    waited = [] if gone else [rank for rank in behind if there[rank].count == fewest]
    waiting = [rank for rank in behind if rank not in waited]
    parts = [f"rank {rank}: {_last(beats[rank])}" for rank in gone]
    parts += [f"rank {rank}: {there[rank].phase}, {there[rank].seconds:.0f} s" for rank in waited]
    text = "; ".join(parts[:8]) + (f"; and {len(parts) - 8} more" if len(parts) > 8 else "")
    if not waiting:
        return text
    shown = ", ".join(
        f"rank {rank} ({there[rank].phase}, {there[rank].seconds:.0f} s)" for rank in waiting[:4]
    )
    more = f" and {len(waiting) - 4} more" if len(waiting) > 4 else ""
    return f"{text}; waiting for {'it' if len(parts) == 1 else 'them'}: {shown}{more}"


def _last(beat: Beat | None) -> str:
    if beat is None:
        return "no sign of life"
    return f"no sign of life for {beat.silent:.0f} s, last in {beat.phase}"


class Heartbeat(RolloutCallback):
    """Reports processes without progress, and ends the run after `abort_after` seconds.

    A report names each process and its phase, every `warn_after` seconds.

    Each process writes what it does into the store through which the processes met, from a thread
    of its own, so that a main thread that hangs in a reward function or a collective is still heard
    of. Of those that wait, the lowest rank speaks. A process that gives up exits with 75; it prints
    where its main thread stands if it is the one that is waited for.

    Args:
        warn_after: seconds; responses that are being sampled count as progress.
        abort_after: seconds; below the process group's own timeout, which names nobody. None:
            never. One process alone never gives up.
        every: seconds between two beats.
    """

    def __init__(
        self, warn_after: float = 120.0, abort_after: float | None = 1500.0, every: float = 5.0
    ) -> None:
        positive("Heartbeat", warn_after=warn_after, abort_after=abort_after, every=every)
        if warn_after < every:
            raise UserError(
                f"`Heartbeat` needs 0 < every <= warn_after, got {every} and {warn_after}"
            )
        if abort_after is not None and abort_after < warn_after:
            raise UserError(
                f"`Heartbeat.abort_after` ({abort_after}) must not be below `warn_after` "
                f"({warn_after})"
            )
        self.warn_after, self.abort_after, self.every = warn_after, abort_after, every
        self._own = (0, "set-up")
        self._moved = time.monotonic()
        self._stop: threading.Event | None = None
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._rank, self._world = 0, 1
        self._store: dist.Store | None = None

    # --- what this process does --------------------------------------------------------------

    def _enter(self, phase: str) -> None:
        self._own = (self._own[0] + 1, phase)
        self._moved = time.monotonic()

    def on_rollout_phase(self, phase: str) -> None:
        self._enter(phase)

    def on_rollout_tokens(self, tokens: int, running: int) -> None:
        self._moved = time.monotonic()

    on_evaluation_tokens = on_rollout_tokens

    def on_rollout_end(self, trainer: L.Trainer, module: PolicyOptimization, event: Any) -> None:
        self._enter("other callbacks of the rollout")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter("start of training")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter("forward")

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any
    ) -> None:
        self._enter("backward")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        self._enter("optimizer step")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._enter("between two micro-batches")

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._enter("validation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter("after validation")

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._enter("saving a checkpoint")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter("end of training")

    # --- the watcher -------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self._stop is not None:
            return
        self._rank, self._world = trainer.global_rank, trainer.world_size
        if self._world > 1:
            shared: Any = dist.distributed_c10d._get_default_store()
            present = shared.clone()  # another connection: the main thread may block the first
            self._store = dist.PrefixStore("heartbeat", present)
        self._enter("set-up")
        self._stop = threading.Event()
        threading.Thread(
            target=self._watch, args=(self._stop,), daemon=True, name="heartbeat"
        ).start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._enter(f"stopping after {type(exception).__name__}")

    def _watch(self, stop: threading.Event) -> None:
        reported = 0.0
        while not stop.wait(self.every):
            present = Beat(*self._own, time.monotonic() - self._moved)
            beats = self._exchange(present)
            if present.seconds < self.warn_after:
                reported = 0.0
                continue
            give_up = (
                self._world > 1
                and self.abort_after is not None
                and present.seconds >= self.abort_after
            )
            if (give_up or present.seconds >= reported + self.warn_after) and self._speaks(beats):
                reported = present.seconds
                ending = "; giving up" if give_up else ""
                self._say(
                    f"no progress for {present.seconds:.0f} s: "
                    f"{describe(beats, self._patience)}{ending}"
                )
            if give_up:
                self._leave(beats)

    @property
    def _patience(self) -> float:
        return max(6 * self.every, 1.0)

    def _exchange(self, present: Beat) -> list[Beat | None]:
        """Write this process's report, and read those of the others."""
        beats: list[Beat | None] = [None] * self._world
        beats[self._rank] = present
        if self._store is None:
            return beats
        try:
            self._store.set(str(self._rank), json.dumps(asdict(present) | {"at": time.time()}))
            keys = [str(rank) for rank in range(self._world)]
            present_ranks = [rank for rank in range(self._world) if self._store.check([keys[rank]])]
            messages = dict(
                zip(
                    present_ranks,
                    self._store.multi_get([keys[rank] for rank in present_ranks]),
                    strict=True,
                )
            )
        except RuntimeError:  # with the store its host is gone: the others' last words stand
            messages = {}
        now = time.monotonic()
        for rank in range(self._world):
            if rank in messages and self._heard.get(rank, (b"", 0.0))[0] != messages[rank]:
                self._heard[rank] = messages[rank], now
            if rank != self._rank and rank in self._heard:
                words, since = self._heard[rank]
                values = json.loads(words)
                beats[rank] = Beat(values["count"], values["phase"], values["seconds"], now - since)
        return beats

    def _speaks(self, beats: list[Beat | None]) -> bool:
        """Whether this is the lowest rank that waits; where none does, the lowest that is there."""
        there = {r: b for r, b in enumerate(beats) if b is not None and b.silent <= self._patience}
        fewest = min(beat.count for beat in there.values())
        waiting = [rank for rank, beat in there.items() if beat.count > fewest]
        return self._rank == min(waiting or there)

    def _leave(self, beats: list[Beat | None]) -> None:
        """End this process; print its stack if the others waited for it."""
        counts = [beat.count for beat in beats if beat is not None]
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        if self._own[0] == min(counts) and main is not None:
            self._say("it stands at\n" + "".join(traceback.format_stack(main)[-4:]))
        os._exit(EXIT_CODE)

    def _say(self, text: str) -> None:
        print(f"heartbeat  rank {self._rank}: {text}", file=sys.stderr, flush=True)
