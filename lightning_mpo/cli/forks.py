"""The process that runs of `verify-resume` are forked from: `python -m lightning_mpo.cli.forks`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
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
    """Fork a run for each line of the standard input; write its exit status, negative for a signal, and its seconds."""
    for line in sys.stdin:
        job, started = json.loads(line), time.perf_counter()
        run = os.fork()
        if not run:
            os._exit(_forked(job))
        timer = (
            threading.Timer(job["seconds"], os.kill, (run, signal.SIGKILL))
            if job["seconds"] is not None
            else None
        )
        if timer is not None:
            timer.start()
        status = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
        if timer is not None:
            timer.cancel()
            timer.join()
        print(status, time.perf_counter() - started, flush=True)
    return 0


def _forked(job: dict[str, Any]) -> int:
    """Run with the output in a file."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv[1:] = job["arguments"]  # also of the processes that a strategy starts
    try:
        status = _run()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _run() -> int:
    folder, kill, updates, *arguments = sys.argv[1:]
    return guarded(lambda: _fit(Path(folder), kill, int(updates), arguments))


class VerifyCLI(CLI):
    """Sends all output of a run to a folder.

    Args:
        folder: of the run.
        updates: of the run.
    """

    fits = True

    def __init__(self, folder: Path, updates: int, **options: Any) -> None:
        self.folder, self.updates = folder, updates
        super().__init__(**options)

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        trainer = self.config["trainer"]
        trainer["default_root_dir"] = str(self.folder)
        place = Namespace(save_dir=str(self.folder), name="", version="")
        trainer["logger"] = [
            Namespace(class_path="lightning_mpo.resume.metrics_csv.MetricsCSV", init_args=place)
        ]
        callbacks = [
            c
            for c in trainer["callbacks"] or []
            if c["class_path"].rsplit(".", 1)[-1] not in LEFT_OUT
        ]
        for i, callback in enumerate(callbacks):
            # apart from that of the verification
            if callback["class_path"].rsplit(".", 1)[-1] == "ModelCheckpoint":
                callback["init_args"]["dirpath"] = str(self.folder / f"checkpoints-{i}")
        trainer["callbacks"] = callbacks
        trainer["enable_progress_bar"] = trainer["enable_model_summary"] = False
        if trainer["limit_val_batches"] != 0:
            trainer["limit_val_batches"], trainer["check_val_every_n_epoch"] = 1, None
            trainer["val_check_interval"] = max(1, self.updates // 3)


def _fit(folder: Path, kill: str, updates: int, arguments: list[str]) -> None:
    save = ModelCheckpoint(
        folder / "checkpoints",
        save_last=True,
        save_top_k=0,
        every_n_train_steps=1,
        enable_version_counter=False,
    )
    last = folder / "checkpoints" / "last.ckpt"
    fresh = not locate(last).exists()
    die = KillAt.from_text(kill) if kill != "none" else CountEvents(folder / EVENTS)
    needed = [PromptOrder(), ExactResume(), die, save]
    made = VerifyCLI(
        folder,
        updates,
        **OPTIONS
        | {"trainer_defaults": {"callbacks": needed}, "save_config_callback": None, "run": False}
        | {"args": [*arguments, "--trainer.max_steps", str(updates)]},
    )
    made.trainer.fit(made.model, datamodule=made.datamodule, ckpt_path=None if fresh else str(last))


if __name__ == "__main__":
    sys.exit(
        _run() if sys.argv[1:] else serve()
    )  # a strategy starts its processes with the arguments of a run
