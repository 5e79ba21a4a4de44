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
"""File of the undisturbed run: its number of events of each kind."""


class Runs:
    """Runs of a configuration, each a fork of one process that has imported everything.

    Args:
        arguments: of the command line, without a verb.
        updates: number of updates of a run.
    """

    def __init__(self, arguments: list[str], updates: int) -> None:
        self.arguments, self.updates = arguments, updates
        self.seconds = 0.0
        """Duration of the first run, which is the undisturbed one."""
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Runs:
        command = [sys.executable, "-m", "lightning_mpo.cli.fork_server"]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.communicate()

    def run(self, name: str, folder: Path, kill: Kill | None = None, quiet: bool = False) -> bool:
        """Run once, with the output in a file; return whether the run was killed.

        Args:
            name: of the run, for its log and messages.
            folder: folder of the run; a checkpoint in it is resumed.
            kill: when to kill; None: never.
            quiet: print nothing.

        Raises:
            UserError: the run failed.
        """
        # a kill at a time is left to the parent process, a kill at an event to the run
        folder.mkdir(exist_ok=True)
        log = Path(f"{folder}-{name}.log")
        is_timed = kill is not None and kill.phase == "time"
        event = "none" if kill is None or is_timed else str(kill)
        status, seconds = self._submit(
            {
                "arguments": [str(folder), event, str(self.updates), *self.arguments],
                "log": str(log),
                "seconds": kill.at if kill is not None and is_timed else None,
            }
        )
        # a mistake of the user: the run has printed it in one line
        if status == 2:
            raise UserError(
                log.read_text().strip().rsplit("lightning-mpo: ", 1)[-1].splitlines()[0]
            )
        killed = kill is not None and status == -signal.SIGKILL
        if status and not killed:
            raise UserError(
                f"the {name} run failed with exit code {status}; its output is in {log}"
            )
        # report
        self.seconds = self.seconds or seconds
        if not quiet:
            at = f", {kill}" if kill else ""
            print(f"{name:11s}  {self.updates} updates, {seconds:.0f} s{at}", flush=True)
        return killed

    def events(self, folder: Path) -> dict[str, int]:
        """Return the number of events of each kind in the undisturbed run."""
        counts: dict[str, int] = json.loads((folder / EVENTS).read_text())
        return counts

    def _submit(self, job: dict[str, Any]) -> tuple[int, float]:
        """Have the parent process fork a run; return its exit status and its seconds."""
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
