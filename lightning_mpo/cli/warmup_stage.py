"""`warmup:`, a stage that is fitted first, as a separate process, if its checkpoint is missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import lightning as L

from lightning_mpo.callbacks.preemption import SIGNALS, STAGE_CODE, Preempted
from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.recipes import find
from lightning_mpo.storage import locate, unfinished_mark

EARLY = 75
"""Exit code of a stage that was asked to end, and saved (EX_TEMPFAIL of sysexits.h)."""


def check_before_stage(trainer: L.Trainer, module: Any, data: Any) -> None:
    """Refuse mistakes of a run before its warm-up stage, if they can be seen without the checkpoint.

    Args:
        trainer: the trainer of the run, with its callbacks.
        module: the module of the run.
        data: the data of the run.

    Raises:
        UserError: options do not fit each other.
    """
    if not isinstance(module, PolicyOptimization) or not isinstance(data, PromptDataModule):
        return
    for callback in callbacks_of(trainer):
        if isinstance(callback, RolloutLoop):
            callback.check(module.policy, module.objective, data, "fit")
    # check the policy without its checkpoint, which is missing
    policy: Any = module.policy
    checkpoint, policy.checkpoint = policy.checkpoint, None
    try:
        policy.check(module.objective.request)
    finally:
        policy.checkpoint = checkpoint


def fit_first(config: str, checkpoint: str, seed: Any) -> None:
    """Run the stage that makes a checkpoint; a stage that was stopped before continues.

    Args:
        config: configuration of the stage.
        checkpoint: the file that it makes.
        seed: seed of the run; None: that of the stage.

    Raises:
        UserError: the stage failed, did not write the checkpoint, or would run beside other
            processes.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"`policy.checkpoint` {checkpoint!r} is missing; make it first: "
            f"lightning-mpo fit -c {config}"
        )
    find(config, place="`warmup`: ")
    # the command line of the stage
    path, mark = locate(checkpoint), unfinished_mark(checkpoint)
    state = "unfinished" if path.exists() else "missing"
    print(f"warm-up    {checkpoint} is {state}: fitting {config} first", flush=True)
    command = [sys.executable, "-m", "lightning_mpo", "fit", "-c", config]
    command += ["--seed_everything", str(seed)] if seed is not None else []
    command += ["--ckpt_path", checkpoint] if path.exists() else []
    # the mark stays until the stage has ended
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
