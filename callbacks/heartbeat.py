"""Reports the process that the others wait for, instead of hanging silently."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict
from typing import Any

import lightning as L
import torch.distributed as dist

from lightning_mpo.checks import positive
from lightning_mpo.errors import UserError
from lightning_mpo.modules.beats import Beat, describe
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization

EXIT_CODE = 75
"""Exit code of a process that gives up: the system's code for "try again later"."""


class Heartbeat(RolloutCallback):
    """Reports processes without progress, and ends the run after `abort_after` seconds.

    A report comes every `warn_after` seconds, and names each process and its phase.

    A thread of each process writes the phase into the store of `torch.distributed`. The report is
    therefore complete even if a main thread hangs in a reward function or a collective. Only the
    lowest of the waiting ranks prints it. A process that gives up exits with code 75. If the others
    waited for it, it prints the stack of its main thread first.

    Args:
        warn_after: seconds without progress; a response under way makes progress at each token.
        abort_after: seconds without progress; None: never. Keep it below the timeout of the process
            group, whose error names no process. A run of one process never gives up.
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
        self._current_phase = (0, "set-up")
        """Phases begun so far, and the present one; one tuple, as the watching thread reads it."""
        self._last_progress = time.monotonic()
        self._stop: threading.Event | None = None
        self._last_messages: dict[int, tuple[bytes, float]] = {}
        """The last message of each other rank, and the time at which it came."""
        self._rank, self._world = 0, 1
        self._store: dist.Store | None = None

    # --- phases of this process --------------------------------------------------------------

    def _enter(self, phase: str) -> None:
        self._current_phase = (self._current_phase[0] + 1, phase)
        self._last_progress = time.monotonic()

    def on_rollout_phase(self, phase: str) -> None:
        self._enter(phase)

    def on_rollout_tokens(self, tokens: int, running: int) -> None:
        self._last_progress = time.monotonic()

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
            default_store: Any = dist.distributed_c10d._get_default_store()
            # a second connection, as the main thread may block the first
            self._store = dist.PrefixStore("heartbeat", default_store.clone())
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
        last_report = 0.0
        while not stop.wait(self.every):
            # beats of all processes
            beat = Beat(*self._current_phase, time.monotonic() - self._last_progress)
            beats = self._exchange(beat)
            give_up = self._must_give_up(beats)
            if beat.seconds < self.warn_after and not give_up:
                last_report = 0.0
                continue
            # a report every `warn_after` seconds, and before giving up
            report_due = give_up or beat.seconds >= last_report + self.warn_after
            if report_due and self._is_speaker(beats):
                last_report = beat.seconds
                ending = "; giving up" if give_up else ""
                longest = max(other.seconds for other in beats if other is not None)
                self._print(
                    f"no progress for {longest if give_up else beat.seconds:.0f} s: "
                    f"{describe(beats, self._patience)}{ending}"
                )
            if give_up:
                self._give_up(beats)

    def _must_give_up(self, beats: list[Beat | None]) -> bool:
        """Whether this process has waited too long, or another one has given up already."""
        if self._world == 1 or self.abort_after is None:
            return False
        beat = beats[self._rank]
        assert beat is not None, "each process knows its beat"
        too_long = beat.seconds >= self.abort_after
        return too_long or any(other and other.gave_up for other in beats)

    @property
    def _patience(self) -> float:
        """Seconds of silence after which a process counts as gone."""
        return max(6 * self.every, 1.0)

    def _exchange(self, beat: Beat) -> list[Beat | None]:
        """Write the report of this process, and return the last report of each rank."""
        beats: list[Beat | None] = [None] * self._world
        beats[self._rank] = beat
        if self._store is None:
            return beats
        # messages in the store, by rank
        try:
            self._store.set(str(self._rank), json.dumps(asdict(beat) | {"at": time.time()}))
            keys = [str(rank) for rank in range(self._world)]
            reporting = [rank for rank in range(self._world) if self._store.check([keys[rank]])]
            messages = dict(
                zip(
                    reporting,
                    self._store.multi_get([keys[rank] for rank in reporting]),
                    strict=True,
                )
            )
        except RuntimeError:  # the process that hosts the store is gone: use earlier messages
            messages = {}
        # silence counts from the last message that differs from the one before
        now = time.monotonic()
        for rank in range(self._world):
            if rank in messages and self._last_messages.get(rank, (b"", 0.0))[0] != messages[rank]:
                self._last_messages[rank] = messages[rank], now
            if rank != self._rank and rank in self._last_messages:
                message, came_at = self._last_messages[rank]
                values = json.loads(message)
                beats[rank] = Beat(
                    values["count"], values["phase"], values["seconds"], now - came_at,
                    values["gave_up"],
                )  # fmt: skip
        return beats

    def _is_speaker(self, beats: list[Beat | None]) -> bool:
        """Whether this is the lowest of the waiting ranks; if none waits, of the ranks alive."""
        alive = {r: b for r, b in enumerate(beats) if b is not None and b.silent <= self._patience}
        fewest = min(beat.count for beat in alive.values())
        waiting = [rank for rank, beat in alive.items() if beat.count > fewest]
        return self._rank == min(waiting or alive)

    def _give_up(self, beats: list[Beat | None]) -> None:
        """End this process with the others; print its stack if they waited for it."""
        counts = [beat.count for beat in beats if beat is not None]
        main_frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if self._current_phase[0] == min(counts) and main_frame is not None:
            self._print("it stands at\n" + "".join(traceback.format_stack(main_frame)[-4:]))
        # a launcher kills the other processes at the first exit: let each print its part before
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            beats = self._exchange(Beat(*self._current_phase, 0.0, gave_up=True))
            if all(beat.gave_up for beat in beats if beat and beat.silent <= self._patience):
                break
            time.sleep(min(self.every, 0.1))
        os._exit(EXIT_CODE)

    def _print(self, text: str) -> None:
        print(f"heartbeat  rank {self._rank}: {text}", file=sys.stderr, flush=True)
