"""A server process that imports the package once and forks a run for each line on standard input.

A line is JSON: the `arguments` of `lightning-mpo` and the `log` file. The answer is a line with the
exit code of the run. On Linux the server and its run end when the process that started it ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

from lightning_mpo.cli import fit, main
from lightning_mpo.cli.fork_server import run_logged

DIE_WITH_PARENT = 1
"""`PR_SET_PDEATHSIG` of Linux."""


def serve() -> None:
    """Fork a run for each line."""
    _end_with_parent()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(_run(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(job: dict[str, Any]) -> int:
    """Run a command line with its output in a file; return the exit code."""
    _end_with_parent()
    arguments = job["arguments"]
    return run_logged(lambda: main.main(arguments), arguments, job["log"], os.O_TRUNC)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


if __name__ == "__main__":
    assert fit  # imported before the first fork, so that no run has to
    serve()
