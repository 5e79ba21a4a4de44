"""Runs in several lanes. A lane does one run after the other, as forks of one server process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[1]
Fit = Callable[[Sequence[str], Path], int]
"""Runs `lightning-mpo` with arguments and a log file, and returns its exit code."""


class Lane:
    """Does one run after the other, each as a fork of its server process.

    Args:
        threads: number of torch threads of a run.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._server: subprocess.Popen[str] | None = None

    def fit(self, arguments: Sequence[str], log: Path) -> int:
        """Run `lightning-mpo` with its output in a file; return its exit code."""
        log.parent.mkdir(parents=True, exist_ok=True)
        if self._server is None or self._server.poll() is not None:
            self._server = self._start()
        server = self._server
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            server.stdin.write(json.dumps({"arguments": list(arguments), "log": str(log)}) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())
        except (OSError, ValueError):  # the server has ended
            server.kill()
            server.wait()
            return 1

    def close(self) -> None:
        """End the server process."""
        if self._server is not None:
            self._server.communicate()

    def _start(self) -> subprocess.Popen[str]:
        paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "comparing.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )


def work(jobs: Sequence[Callable[[Fit], object]], lanes: int, threads: int) -> None:
    """Do jobs in their order on several lanes, and wait for all of them.

    Args:
        jobs: functions that get the `fit` of a lane.
        lanes: number of lanes.
        threads: number of torch threads of a run.
    """
    queue, lock = list(jobs), threading.Lock()
    errors: list[BaseException] = []

    def drain() -> None:
        lane = Lane(threads)
        try:
            while True:
                with lock:
                    if not queue or errors:
                        return
                    job = queue.pop(0)
                job(lane.fit)
        except BaseException as error:
            errors.append(error)
        finally:
            lane.close()

    workers = [threading.Thread(target=drain, daemon=True) for _ in range(lanes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
