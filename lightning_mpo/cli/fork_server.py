"""The process that runs of `verify-resume` are forked from.

Without arguments, it serves jobs from the standard input. With `FOLDER KILL UPDATES -c CONFIG`, it
is
one run: a strategy starts its other processes with the arguments of the first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import ExactResume, KillAt, PromptOrder
from lightning_mpo.callbacks.kill import CountEvents
from lightning_mpo.cli.forked_runs import EVENTS
from lightning_mpo.cli.guard import guarded
from lightning_mpo.cli.parser import CLI, OPTIONS
from lightning_mpo.storage import locate

LEFT_OUT = ("RolloutProgressBar", "TQDMProgressBar", "RichProgressBar")
"""Callbacks that a verification leaves out, as they need a terminal."""


def serve() -> int:
    """Fork a run for each job, a line of JSON on the standard input.

    For each job, the exit status of its run (negative for a signal) and its seconds are printed.
    """
    for line in sys.stdin:
        # fork the run
        job, started = json.loads(line), time.perf_counter()
        child = os.fork()
        if not child:
            os._exit(_run_job(job))
        # kill it after some seconds, if the job says so
        timer = (
            threading.Timer(job["seconds"], os.kill, (child, signal.SIGKILL))
            if job["seconds"] is not None
            else None
        )
        if timer is not None:
            timer.start()
        # wait for its end
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if timer is not None:
            timer.cancel()
            timer.join()
        print(status, time.perf_counter() - started, flush=True)
    return 0


def _run_job(job: dict[str, Any]) -> int:
    """Run with the output in a file; return the exit code."""
    return run_logged(_run, job["arguments"], job["log"], os.O_APPEND)


def run_logged(run: Callable[[], int], arguments: Sequence[str], log: str, mode: int) -> int:
    """Call a function in this process, with all output in a file.

    Args:
        run: returns the exit code.
        arguments: become those of this process: a strategy starts its processes with them.
        log: the file of the output.
        mode: `os.O_APPEND`, or `os.O_TRUNC` to begin the file anew.

    Returns:
        The exit code; 1 if the function raises, and the file then holds the traceback.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | mode, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv[1:] = arguments
    try:
        status = run()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _run() -> int:
    """Run as the arguments of this process say; return the exit code."""
    folder, kill, updates, *arguments = sys.argv[1:]
    return guarded(lambda: _fit(Path(folder), kill, int(updates), arguments))


class VerificationCheckpoint(ModelCheckpoint):
    """Has a class of its own, as two callbacks of one class and schedule cannot both be saved."""


class VerifyCLI(CLI):
    """Sends all output of a run to a folder.

    Args:
        folder: folder of the run.
        updates: number of updates of the run.
        options: as for `LightningCLI`.
    """

    trains = True

    def __init__(self, folder: Path, updates: int, **options: Any) -> None:
        self.folder, self.updates = folder, updates
        super().__init__(**options)

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        trainer = self.config["trainer"]
        # metrics go to the folder
        trainer["default_root_dir"] = str(self.folder)
        logger_options = Namespace(save_dir=str(self.folder), name="", version="")
        trainer["logger"] = [
            Namespace(
                class_path="lightning_mpo.resume.metrics_csv.MetricsCSV", init_args=logger_options
            )
        ]
        # checkpoints of the configuration go beside the one of the verification
        callbacks = [
            callback
            for callback in trainer["callbacks"] or []
            if _short_name(callback) not in LEFT_OUT
        ]
        for i, callback in enumerate(callbacks):
            if _short_name(callback) == "ModelCheckpoint":
                callback["init_args"]["dirpath"] = str(self.folder / f"checkpoints-{i}")
        trainer["callbacks"] = callbacks
        # no output to a terminal, and few validations
        trainer["enable_progress_bar"] = trainer["enable_model_summary"] = False
        if trainer["limit_val_batches"] != 0:
            trainer["limit_val_batches"], trainer["check_val_every_n_epoch"] = 1, None
            trainer["val_check_interval"] = max(1, self.updates // 3)


def _short_name(callback: Any) -> str:
    return str(callback["class_path"]).rsplit(".", 1)[-1]


def _fit(folder: Path, kill: str, updates: int, arguments: list[str]) -> None:
    """Fit once, from the last checkpoint of the folder if there is one.

    Args:
        folder: of the run.
        kill: `PHASE:N`, the event to kill at, or "none".
        updates: of the run.
        arguments: of the command line, without a verb.
    """
    # a checkpoint after each update
    save = VerificationCheckpoint(
        folder / "checkpoints",
        save_last=True,
        save_top_k=0,
        every_n_train_steps=1,
        enable_version_counter=False,
    )
    last = folder / "checkpoints" / "last.ckpt"
    is_new = not locate(last).exists()
    # kill the run, or count its events
    events = KillAt.from_text(kill) if kill != "none" else CountEvents(folder / EVENTS)
    callbacks = [PromptOrder(), ExactResume(), events, save]
    cli = VerifyCLI(
        folder,
        updates,
        **OPTIONS
        | {"trainer_defaults": {"callbacks": callbacks}, "save_config_callback": None, "run": False}
        | {"args": [*arguments, "--trainer.max_steps", str(updates)]},
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=None if is_new else str(last))


if __name__ == "__main__":
    sys.exit(_run() if sys.argv[1:] else serve())
