"""`warmup:`: a stage that is fitted first, as a process of its own, where its checkpoint is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

from lightning_mpo.callbacks.preemption import SIGNALS, STAGE_CODE, Preempted
from lightning_mpo.errors import UserError
from lightning_mpo.recipes import find
from lightning_mpo.storage import locate, unfinished_mark

EARLY = 75
"""Exit code of a warm-up stage that was asked to go, and saved (EX_TEMPFAIL of sysexits.h)."""


def fit_first(config: str, checkpoint: str, seed: Any) -> None:
    """Run the stage that makes a checkpoint, as a process of its own; one that was stopped before goes on."""
    if int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"`policy.checkpoint` {checkpoint!r} is missing; make it first: lightning-mpo fit -c {config}"
        )
    find(config, place="`warmup`: ")
    path, mark = locate(checkpoint), unfinished_mark(checkpoint)
    state = "unfinished" if path.exists() else "missing"
    print(f"warm-up    {checkpoint} is {state}: fitting {config} first", flush=True)
    command = [sys.executable, "-m", "lightning_mpo", "fit", "-c", config]
    command += ["--seed_everything", str(seed)] if seed is not None else []
    command += ["--ckpt_path", checkpoint] if path.exists() else []
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    code = run_stage(command)
    if code == EARLY:
        print(f"warm-up    {config} was stopped; the same command goes on with it", flush=True)
        raise Preempted
    if code:
        advice = f"; to begin it afresh, delete {checkpoint}" if path.exists() else ""
        raise UserError(f"the warm-up stage {config!r} failed with exit code {code}{advice}")
    mark.unlink(missing_ok=True)
    if not path.exists():
        raise UserError(
            f"the warm-up stage {config!r} did not write `policy.checkpoint` {checkpoint!r}"
        )


def run_stage(command: list[str]) -> int:
    """Run a process that is stopped with this one, and return its exit code: `EARLY` if it was asked to go."""
    process = subprocess.Popen(command, env=os.environ | {STAGE_CODE: str(EARLY)})
    passed: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        passed.append(number)
        process.send_signal(number)

    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in SIGNALS} if here else {}
    try:
        code = process.wait()
    except KeyboardInterrupt:  # of a terminal, which interrupts the stage as well
        try:
            process.wait(10)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return EARLY if passed and code == -passed[0] else code
