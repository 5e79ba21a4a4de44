"""One stage as a separate process: begun, or continued if it was stopped before its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mpo.callbacks.preemption import SIGNALS, STAGE_CODE, Preempted
from lightning_mpo.data.annotations import SIDE_FILE
from lightning_mpo.errors import UserError
from lightning_mpo.storage import locate, unfinished_mark

EARLY = 75
"""Exit code of a stage that was asked to end, and saved (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True)
class Entry:
    """A stage, its command and its result.

    Args:
        kind: "warm-up" or "stage", the beginning of printed lines.
        name: the stage, for messages.
        words: the command line, without the program.
        result: the checkpoint of `fit`, or the folder of `annotate`.
        shown: the result, for messages.
    """

    kind: str
    name: str
    words: tuple[str, ...]
    result: str
    shown: str

    @property
    def path(self) -> Path:
        """The result on the disk."""
        return locate(self.result)

    @property
    def is_there(self) -> bool:
        """Whether the result, or a part of it, is on the disk."""
        return self.path.exists()

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that the stage continues from; None: it begins."""
        return self.result if self.words[0] == "fit" and self.is_there else None

    @property
    def is_unfinished(self) -> bool:
        """Whether the stage was begun and has not ended."""
        return unfinished_mark(self.result).exists()

    @property
    def is_done(self) -> bool:
        """Whether the stage has ended and its result is there."""
        whole = self.path if self.words[0] == "fit" else self.path / SIDE_FILE
        return whole.exists() and not self.is_unfinished


def run_entry(entry: Entry) -> None:
    """Run a stage as a process. `fit` continues from its checkpoint, `annotate` begins again.

    A mark beside the result exists until the stage has ended.

    Args:
        entry: the stage.

    Raises:
        UserError: the stage failed, or did not write its result.
        Preempted: a signal stopped the stage.
    """
    # the command
    mark, words = unfinished_mark(entry.result), list(entry.words)
    if entry.checkpoint is not None:
        words += ["--ckpt_path", entry.checkpoint]
    elif entry.is_unfinished:
        shutil.rmtree(entry.path, ignore_errors=True)
    # run it
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    code = run_stage([sys.executable, "-m", "lightning_mpo", *words])
    # its end
    name = f"{'warm-up stage' if entry.kind == 'warm-up' else 'stage'} {entry.name!r}"
    if code == EARLY:
        print(
            f"{entry.kind:11}{entry.name} was stopped; the same command goes on with it", flush=True
        )
        raise Preempted
    if code:
        advice = f"; to begin it afresh, delete {entry.result}" if entry.is_there else ""
        raise UserError(f"the {name} failed with exit code {code}{advice}")
    mark.unlink(missing_ok=True)
    if not entry.is_done:
        raise UserError(f"the {name} did not write {entry.shown}")


def run_stage(command: list[str]) -> int:
    """Run a process that gets the signals of this one.

    Args:
        command: the command and its arguments.

    Returns:
        The exit code of the process: `EARLY` if it was asked to end.
    """
    # pass signals on, which a main thread alone can receive
    process = subprocess.Popen(command, env=os.environ | {STAGE_CODE: str(EARLY)})
    received: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        process.send_signal(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = SIGNALS if in_main_thread else ()
    handlers = {number: signal.signal(number, pass_on) for number in signals}
    # wait for its end
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal interrupts the stage as well
        try:
            process.wait(10)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return EARLY if received and code == -received[0] else code
