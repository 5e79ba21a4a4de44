"""Judge a program by its tests, in a process with limits. This is no sandbox: the process may read files and the network."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

PASSED = 77  # an exit status that a program does not reach by ending early
RUNNER = f"""
import os, resource, sys
seconds, bytes = int(sys.argv[1]), int(sys.argv[2])
for what, limit in (("CPU", seconds), ("AS", bytes), ("FSIZE", 1 << 20), ("CORE", 0), ("NPROC", 64)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (limit, limit))
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "program"}})
os._exit({PASSED})
"""


def passes(program: str, seconds: int = 5, megabytes: int = 1024) -> bool:
    """Run a program that ends with its tests; True if it got to its end.

    Args:
        program: Python source.
        seconds: CPU time; twice as much of the clock.
        megabytes: address space.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", RUNNER, str(seconds), str(megabytes << 20)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(program.encode(errors="replace"), timeout=2 * seconds)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
    return process.returncode == PASSED
