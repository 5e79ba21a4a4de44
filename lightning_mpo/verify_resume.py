"""`lightning-mpo verify-resume`: kill a run of a configuration, resume it, and compare it bit for bit."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mpo.errors import UserError, plainly

if TYPE_CHECKING:
    from lightning_mpo.callbacks import KillAt

DROPPED = ("RolloutProgressBar", "TQDMProgressBar", "RichProgressBar")
"""Callbacks that a verification leaves out, as they need a terminal."""
EVENTS = "events.json"
"""Written by the undisturbed run: how many events of each kind it had."""
MOST = 3
"""Most kills of one run."""
MOST_UPDATES, MOST_KILLS = 1_000_000, 100_000


@dataclass(frozen=True)
class Kill:
    """When a run dies.

    Args:
        phase: an event of `KillAt`; "time": a share of the undisturbed run's seconds.
        at: which event, from 1; with "time", the seconds.
    """

    phase: str
    at: float

    def __str__(self) -> str:
        return f"time:{self.at:.2f}s" if self.phase == "time" else f"{self.phase}:{self.at:.0f}"


def main(arguments: list[str]) -> int:
    """Run a configuration undisturbed, then killed and resumed; print the comparison.

    Returns:
        0: all is the same; 1: something differs; 2: a mistake of the user.
    """
    parser = argparse.ArgumentParser(
        "lightning-mpo verify-resume",
        description=__doc__,
        usage="%(prog)s -c CONFIG [-c CONFIG ...] [options]",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--updates", type=int, default=6, help="updates of a run (default: 6)")
    parser.add_argument("--kill", metavar="PHASE:N", help="the event to kill at (default: the update after the middle)")
    parser.add_argument("--kills", type=int, help="number of kills, at random events and times, up to 3 in one run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random kills (default: 0)")
    parser.add_argument("--folder", help="folder of the runs (default: a temporary one)")
    return plainly(lambda: _verify(*parser.parse_known_args(arguments)))


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    check_updates(options.updates)
    if options.kills is None:
        kill = f"update:{options.updates // 2 + 1}" if options.kill is None else options.kill
        return verify(rest, options.updates, kill, options.folder)
    if options.kill is not None:
        raise UserError("`--kill` names one event and `--kills` draws them at random: give one of the two")
    if not 1 <= options.kills <= MOST_KILLS:
        raise UserError(f"`--kills` must be from 1 to {MOST_KILLS:,}, got {options.kills}")
    made = _new_folder(options.folder, "whole")
    with Runs(rest, options.updates) as runs:
        return verify_often(runs, options.kills, options.seed, made)


def verify(arguments: list[str], updates: int, kill: str, folder: str | None) -> int:
    """Make the runs, each as a separate process, and compare their results.

    Args:
        arguments: of the command line, for `fit`.
        updates: updates of a run.
        kill: `PHASE:N`.
        folder: folder of the runs; None: a temporary one.

    Returns:
        0: all is the same; 1: something differs.

    Raises:
        UserError: the kill is not an event of the run, or a run fails.
    """
    check_updates(updates)
    killer(kill)
    made = _new_folder(folder, "whole", "killed")
    with Runs(arguments, updates) as runs:
        runs.run("undisturbed", made / "whole")
        phase, _, count = kill.partition(":")
        if not runs.run("killed", made / "killed", Kill(phase, int(count))):
            raise UserError(f"the run ended before the kill at {kill!r}: give a smaller number, or more `--updates`")
        runs.run("continued", made / "killed")
        return report(runs, made, kill)


def report(runs: Runs, made: Path, kill: str) -> int:
    """Print the comparison after one kill; return 1 if something differs."""
    from lightning_mpo.modules.comparison import compare_runs

    parts = compare_runs(made / "whole", made / "killed")
    width = max(len(part.part) for part in parts)
    for part in parts:
        print(f"{part.part:{width}s}  {part.count:6d} values  {'differs' if part.difference else 'bit for bit'}")
    first = next((part.difference for part in parts if part.difference), None)
    print(f"first difference: {first}" if first else f"a run killed at {kill} goes on as if it had not been")
    if first:
        explain(runs, made)
    return int(first is not None)


def explain(runs: Runs, made: Path) -> None:
    """Print whether two undisturbed runs are equal; if not, the resume is not the cause of a difference."""
    from lightning_mpo.modules.comparison import compare_runs

    runs.run("again", made / "again", quiet=True)
    first = next((part.difference for part in compare_runs(made / "whole", made / "again") if part.difference), None)
    print(
        f"two undisturbed runs differ as well ({first}): look for a reward or a kernel that does not repeat itself; "
        "OMP_NUM_THREADS=1 or MKL_CBWR=COMPATIBLE may help"
        if first
        else "two undisturbed runs are the same bit for bit: the difference comes from the resume"
    )


def verify_often(runs: Runs, kills: int, seed: int, folder: Path) -> int:
    """Kill runs at random events and times, and compare each run with the undisturbed one.

    Args:
        runs: runs of the configuration.
        kills: number of kills.
        seed: seed of the random kills.
        folder: folder of the runs.

    Returns:
        0: all is the same; 1: something differs.

    Raises:
        UserError: a run fails.
    """
    draw, left, bad, trial = random.Random(seed), kills, 0, 0
    runs.run("undisturbed", folder / "whole")
    from lightning_mpo.modules.comparison import compare_runs

    while left:
        trial += 1
        run, done = folder / f"killed-{trial}", []
        for kill in draw_kills(draw, min(left, draw.randint(1, MOST)), runs.events(folder / "whole"), runs.seconds):
            if not runs.run("killed", run, kill, quiet=True):
                break
            done.append(kill)
        else:
            runs.run("continued", run, quiet=True)
        left -= len(done)
        first = next((part.difference for part in compare_runs(folder / "whole", run) if part.difference), None)
        bad += first is not None
        print(f"run {trial:3d}  {', '.join(map(str, done)) or 'no kill':40s}  {first or 'bit for bit'}", flush=True)
    if bad:
        explain(runs, folder)
    print(f"{kills} kills in {trial} runs: " + (f"{bad} runs differ" if bad else "all went on bit for bit"))
    return int(bad > 0)


def draw_kills(draw: random.Random, count: int, events: dict[str, int], seconds: float) -> list[Kill]:
    """Return kills of one run, in order; each falls into an equal share of the rest of the run."""
    phases = [*(phase for phase, n in events.items() if n), "time"]
    kills = []
    for i in range(count):
        phase, share = draw.choice(phases), 1 / (count - i)
        if phase == "time":
            kills.append(Kill(phase, draw.uniform(0.0, seconds * share)))
        else:
            kills.append(Kill(phase, draw.randint(1, max(1, round(events[phase] * share / (i + 1))))))
    return kills


def check_updates(updates: int) -> None:
    """Refuse a run with no update after a kill, and one without an end.

    Raises:
        UserError: `updates` is below 2 or above `MOST_UPDATES`.
    """
    if not 2 <= updates <= MOST_UPDATES:
        raise UserError(f"`--updates` must be from 2 to {MOST_UPDATES:,}, got {updates}")


def _new_folder(folder: str | None, *names: str) -> Path:
    if folder is not None and not folder.strip():
        raise UserError("`--folder` needs the name of a folder")
    made = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="verify-resume-"))
    if made.exists() and not made.is_dir():
        raise UserError(f"`--folder` {str(made)!r} is a file: give a folder")
    if any((made / name).exists() for name in names):
        raise UserError(f"`--folder` {str(made)!r} holds runs of an earlier verification: give another folder")
    made.mkdir(parents=True, exist_ok=True)
    return made


class Runs:
    """Runs of a configuration, each a fork of one process that has imported everything.

    Args:
        arguments: of the command line, for `fit`.
        updates: updates of a run.
    """

    def __init__(self, arguments: list[str], updates: int) -> None:
        self.arguments, self.updates = arguments, updates
        self.seconds = 0.0
        """Duration of the undisturbed run."""
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Runs:
        command = [sys.executable, "-m", "lightning_mpo.verify_resume", "--serve"]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.communicate()

    def run(self, name: str, folder: Path, kill: Kill | None = None, quiet: bool = False) -> bool:
        """Run once, with the output in a file; return whether it was killed.

        Args:
            name: of the run, for its log and messages.
            folder: folder of the run; a checkpoint in it is resumed.
            kill: when to kill; None: never.
            quiet: print nothing.

        Raises:
            UserError: the run failed.
        """
        folder.mkdir(exist_ok=True)
        log = Path(f"{folder}-{name}.log")
        timed = kill is not None and kill.phase == "time"
        event = "none" if kill is None or timed else str(kill)
        status, seconds = self._ask(
            {
                "arguments": [str(folder), event, str(self.updates), *self.arguments],
                "log": str(log),
                "seconds": kill.at if kill is not None and timed else None,
            }
        )
        if status == 2:  # the run has printed its mistake in one line
            raise UserError(log.read_text().strip().rsplit("lightning-mpo: ", 1)[-1].splitlines()[0])
        killed = kill is not None and status == -signal.SIGKILL
        if status and not killed:
            raise UserError(f"the {name} run failed with exit code {status}; its output is in {log}")
        self.seconds = self.seconds or seconds
        if not quiet:
            print(f"{name:11s}  {self.updates} updates, {seconds:.0f} s" + (f", {kill}" if kill else ""), flush=True)
        return killed

    def events(self, folder: Path) -> dict[str, int]:
        """Return the number of events of each kind in the undisturbed run."""
        counts: dict[str, int] = json.loads((folder / EVENTS).read_text())
        return counts

    def _ask(self, job: dict[str, Any]) -> tuple[int, float]:
        server = self._server
        assert server is not None
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            status, seconds = server.stdout.readline().split()
            return int(status), float(seconds)
        except (OSError, ValueError) as error:
            raise UserError("the parent process of the runs has ended; its output is above") from error


# --- in the process that runs are forked from ---------------------------------------------------------------------------


def serve() -> int:
    """Fork a run for each line of the standard input; write its exit status, negative for a signal, and its seconds."""
    from lightning_mpo import cli  # noqa: F401  imported once

    for line in sys.stdin:
        job, started = json.loads(line), time.perf_counter()
        run = os.fork()
        if not run:
            os._exit(_forked(job))
        timer = threading.Timer(job["seconds"], os.kill, (run, signal.SIGKILL)) if job["seconds"] is not None else None
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
        status = child()
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def child() -> int:
    """Run a configuration in a folder: `python -m lightning_mpo.verify_resume FOLDER KILL UPDATES ARGUMENTS`."""
    folder, kill, updates, *arguments = sys.argv[1:]
    from lightning_mpo import cli

    return cli.guarded(lambda: _fit(Path(folder), kill, int(updates), arguments))


def _fit(folder: Path, kill: str, updates: int, arguments: list[str]) -> None:
    from jsonargparse import Namespace
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_mpo import cli
    from lightning_mpo.callbacks import ExactResume, PromptOrder
    from lightning_mpo.callbacks.kill import CountEvents
    from lightning_mpo.storage import locate

    class VerifyCLI(cli.CLI):
        """Sends all output of a run to the folder."""

        fits = True

        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            trainer = self.config["trainer"]
            trainer["default_root_dir"] = str(folder)
            place = Namespace(save_dir=str(folder), name="", version="")
            trainer["logger"] = [Namespace(class_path="lightning_mpo.callbacks.MetricsCSV", init_args=place)]
            callbacks = [c for c in trainer["callbacks"] or [] if c["class_path"].rsplit(".", 1)[-1] not in DROPPED]
            for i, callback in enumerate(callbacks):
                if (
                    callback["class_path"].rsplit(".", 1)[-1] == "ModelCheckpoint"
                ):  # apart from that of the verification
                    callback["init_args"]["dirpath"] = str(folder / f"checkpoints-{i}")
            trainer["callbacks"] = callbacks
            trainer["enable_progress_bar"] = trainer["enable_model_summary"] = False
            if trainer["limit_val_batches"] != 0:
                trainer["limit_val_batches"], trainer["check_val_every_n_epoch"] = 1, None
                trainer["val_check_interval"] = max(1, updates // 3)

    save = ModelCheckpoint(
        folder / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=1, enable_version_counter=False
    )
    last = folder / "checkpoints" / "last.ckpt"
    fresh = not locate(last).exists()
    die = killer(kill) if kill != "none" else CountEvents(folder / EVENTS)
    needed = [PromptOrder(), ExactResume(), die, save]
    made = VerifyCLI(
        **cli.OPTIONS
        | {"trainer_defaults": {"callbacks": needed}, "save_config_callback": None, "run": False}
        | {"args": [*arguments, "--trainer.max_steps", str(updates)]}
    )
    made.trainer.fit(made.model, datamodule=made.datamodule, ckpt_path=None if fresh else str(last))


def killer(kill: str) -> KillAt:
    """Return the callback for `PHASE:N`.

    Raises:
        UserError: the phase is unknown, or N is not a number from 1 on.
    """
    from lightning_mpo.callbacks import KillAt
    from lightning_mpo.callbacks.kill import PHASES

    phase, _, count = kill.partition(":")
    if phase not in PHASES or not re.fullmatch(r"0*[1-9][0-9]{0,11}", count):
        raise UserError(f"`--kill` must be one of {', '.join(PHASES)} and a number, such as update:4, got {kill!r}")
    return KillAt(phase, int(count))


def start(arguments: Sequence[str]) -> int:
    """Run the server of forks (`--serve`), or one run."""
    return serve() if list(arguments) == ["--serve"] else child()


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
