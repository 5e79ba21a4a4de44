"""Lets a run save before the system ends it, and resume later."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mpo.errors import UserError
from lightning_mpo.resume.checkpoints import find_last, last_path
from lightning_mpo.storage import read_checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STAGE_CODE = "LIGHTNING_MPO_PREEMPTED"
"""Environment variable with the exit code of a preempted warm-up stage.

By this code the run that waits for the stage tells a preempted stage from a finished one.
"""


class Preempted(SystemExit):
    """Ends a run that has saved after a signal to stop; the process exits with 0."""

    def __init__(self) -> None:
        super().__init__(int(os.environ.get(STAGE_CODE, 0)))


class Preemption(L.Callback):
    """Saves `last.ckpt` after the present update on SIGTERM or SIGUSR1, and exits with 0.

    A signal to one process is enough: after each update the processes compare their signals.

    SLURM sends SIGUSR1 ahead of a time limit with `#SBATCH --signal=SIGUSR1@300`. On SIGUSR1 the
    callback also puts the job back into the queue with `scontrol requeue`. Started again with
    `--ckpt_path last`, the run goes on.

    A save in the middle of an update would lose its gradients. The run therefore finishes the
    rollout and the update under way first. Lightning's handlers, which save at once, are replaced.
    """

    def __init__(self) -> None:
        self._received_signal = 0
        """Number of the signal that this process received; 0: none."""
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        connector = trainer._signal_connector
        if connector.received_sigterm:  # before the first update, such as in an evaluation
            self._received_signal, connector.received_sigterm = signal.SIGTERM, False
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {
                number: signal.signal(number, self._on_signal) for number in SIGNALS
            }

    def _on_signal(self, number: int, frame: Any) -> None:
        self._received_signal = max(self._received_signal, number)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        received = self._signal_of_any_process(trainer)
        if received:
            # checkpoint, then the line on how to resume
            path = last_path(trainer)
            trainer.save_checkpoint(path)
            advice = (
                ""
                if STAGE_CODE in os.environ
                else "; the same command goes on with `--ckpt_path last`"
            )
            rank_zero_info(
                f"preempted  {signal.Signals(received).name}: saved {path} at update "
                f"{trainer.global_step}{advice}"
            )
            if received == signal.SIGUSR1 and trainer.is_global_zero:
                requeue()
            raise Preempted

    def _signal_of_any_process(self, trainer: L.Trainer) -> int:
        """Return the highest signal that any process received; 0: none."""
        if trainer.world_size == 1:
            return self._received_signal
        received = torch.tensor(float(self._received_signal), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()
        advises = trainer.is_global_zero and STAGE_CODE not in os.environ
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit" and advises:
            rank_zero_info(_resume_advice(trainer))

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


def _resume_advice(trainer: L.Trainer) -> str:
    """Return the line for a run stopped by Ctrl-C: the checkpoint to resume from, if any."""
    line = f"stopped    at update {trainer.global_step}: "
    path = find_last(trainer)
    if path is None:
        return line + "there is no checkpoint to go on from (`kill PID` lets a run save first)"
    line += f"the same command goes on with `--ckpt_path last` from {path}"
    return f"{line}, {_update_of(path)}"


def _update_of(path: Path) -> str:
    """Return the update at which a checkpoint was saved, as a part of a sentence."""
    try:
        return f"update {read_checkpoint(path, part='outline')['global_step']}"
    except UserError:
        return "which cannot be read"


def requeue() -> None:
    """Ask SLURM to run this job again; without SLURM, do nothing."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        return
    try:
        process = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False
        )
        cause = process.stderr.strip() if process.returncode else ""
    except OSError as error:
        cause = str(error)
    if cause:
        rank_zero_warn(
            f"`scontrol requeue {job}` failed ({cause}): submit the job again with `--ckpt_path "
            "last`"
        )
    else:
        rank_zero_info(f"preempted  job {job} is in the queue again")
