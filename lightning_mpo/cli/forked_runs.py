"""Runs of `verify-resume`, each a fork of one process that has imported everything."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.resume.kills import Kill

EVENTS = "events.json"
"""Written by the undisturbed run: how many events of each kind it had."""


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
        command = [sys.executable, "-m", "lightning_mpo.cli.forks"]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
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
            raise UserError(
                log.read_text().strip().rsplit("lightning-mpo: ", 1)[-1].splitlines()[0]
            )
        killed = kill is not None and status == -signal.SIGKILL
        if status and not killed:
            raise UserError(
                f"the {name} run failed with exit code {status}; its output is in {log}"
            )
        self.seconds = self.seconds or seconds
        if not quiet:
            print(
                f"{name:11s}  {self.updates} updates, {seconds:.0f} s"
                + (f", {kill}" if kill else ""),
                flush=True,
            )
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
            raise UserError(
                "the parent process of the runs has ended; its output is above"
            ) from error
