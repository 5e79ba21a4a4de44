"""Limits of time and memory for chat templates, which are programs written by others."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

CPU_SECONDS = 5
"""CPU time of one call in `first_failure`."""
WALL_SECONDS = 60.0
"""Seconds of real time that one call in `first_failure` may take, on a busy machine."""
MEMORY = 2 * 2**30
"""Bytes that the calls of `first_failure` may take."""


class TimeLimitError(Exception):
    """A block took longer than `time_limit` allows."""


def first_failure(calls: Sequence[Callable[[], object]]) -> tuple[int, str] | None:
    """Try calls in a child process, and find the first that fails.

    A call that takes too much time or memory fails as well, even inside a C function. On a system
    without `fork`, nothing is tried.

    Args:
        calls: without arguments; their results are dropped.

    Returns:
        The index of the call and the reason, in one line; None: all calls succeed.
    """
    if not calls or not hasattr(os, "fork"):
        return None
    # fork; the child runs the calls and writes records
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # the warning of a fork beside threads: the child starts none
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run(calls, writing)
    os.close(writing)
    try:
        records = _records(reading)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # the last record: all calls done, a reason, or the call at which the child was killed
    last = records[-1] if records else 0
    if last == len(calls):
        return None
    if isinstance(last, list):
        return last[0], last[1]
    return last, f"it takes over {CPU_SECONDS} s, or over {MEMORY // 2**30} GiB"


def _run(calls: Sequence[Callable[[], object]], writing: int) -> None:
    """Write the index of each call before it begins, and [index, reason] of the first failure."""
    # limit the memory, and write no core dump
    number, record = 0, ""
    try:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        pass  # not Linux, or a lower limit is set already
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # run the calls, each with its own limit of CPU time
    try:
        for number, call in enumerate(calls):
            os.write(writing, f"{number}\n".encode())
            with contextlib.suppress(OSError, ValueError):
                used = int(time.process_time())
                resource.setrlimit(
                    resource.RLIMIT_CPU, (used + CPU_SECONDS, resource.RLIM_INFINITY)
                )
            call()
        record = f"{len(calls)}\n"
    except BaseException as error:
        reason = str(error) if _is_plain(error) else f"{type(error).__name__}: {error}".rstrip(": ")
        record = json.dumps([number, reason[:2000]]) + "\n"
    finally:
        os.write(writing, record.encode())
        os._exit(0)


def _is_plain(error: BaseException) -> bool:
    """Return whether the text of an error needs no name of its type to be understood."""
    return type(error).__name__ == "TemplateError" or isinstance(error, ValueError)


def _records(reading: int) -> list[Any]:
    """Read the records of `_run` until it ends, or until it writes nothing for `WALL_SECONDS`."""
    data = b""
    while select.select([reading], [], [], WALL_SECONDS)[0]:
        part = os.read(reading, 65_536)
        if not part:
            break
        data += part
    lines = data.decode(errors="replace").split("\n")[:-1]
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limit the time of a block. It works in any thread, but cannot interrupt a C function.

    Args:
        seconds: real time.

    Raises:
        TimeLimitError: in the block, once the time has passed.
    """
    thread, lock, state = threading.get_ident(), threading.Lock(), {"inside": True}

    def interrupt() -> None:
        with lock:
            if state["inside"]:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(TimeLimitError)
                )

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            state["inside"] = False
        timer.cancel()
