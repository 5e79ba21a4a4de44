"""The pool: sandboxes that wait for programs, one thread of this process for each."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

from lightning_mpo.rewards.sandbox.container import Sandbox
from lightning_mpo.rewards.sandbox.jobs import Job, Result, same_output
from lightning_mpo.rewards.sandbox.levels import Level
from lightning_mpo.rewards.sandbox.limits import Limits


class Pool:
    """Runs programs in sandboxes that wait for them.

    The sandboxes start at the first program, and again after a fork of this process.

    Args:
        level: how programs are isolated.
        limits: of each program.
        workers: sandboxes.
    """

    def __init__(self, level: Level, limits: Limits, workers: int) -> None:
        self.level, self.limits, self.workers = level, limits, workers
        self._free: SimpleQueue[Sandbox] = SimpleQueue()
        self._owner, self._lock = 0, threading.Lock()
        self._open: list[Sandbox] = []

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Run programs; return their results in the same order.

        Raises:
            UserError: a sandbox does not start.
        """
        self._start()
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(self._run, jobs))

    def _start(self) -> None:
        with self._lock:
            if self._owner != os.getpid():
                self._free, self._open = SimpleQueue(), []
                _pools.add(self)
                for _ in range(self.workers):
                    self._open.append(Sandbox(self.level, self.limits))
                    self._free.put(self._open[-1])
                self._owner = os.getpid()

    def _run(self, job: Job) -> Result:
        sandbox = self._free.get()
        try:
            return _all_cases(sandbox, job) if job.cases else _once(sandbox, job, None)
        finally:
            self._free.put(sandbox)

    def close(self) -> None:
        """End all sandboxes of this process."""
        with self._lock:
            if self._owner == os.getpid():
                for sandbox in self._open:
                    sandbox.close()
            self._owner, self._open = 0, []


def _once(sandbox: Sandbox, job: Job, stdin: str | None) -> Result:
    """Run a program once; a second time if its sandbox ended, as memory of others may end it."""
    result = sandbox.run(job, stdin)
    return result if result.end != "lost" else sandbox.run(job, stdin)


def _all_cases(sandbox: Sandbox, job: Job) -> Result:
    """Run a script on its inputs and compare its outputs."""
    passed = total = 0
    for stdin, right in job.cases:
        result = _once(sandbox, job, stdin)
        if result.end != "exit" or not result.compiled:
            return result
        total += 1
        good = result.status == 0 and same_output(result.output, right)
        passed += good
        if not good and not job.each:
            break
    return replace(result, passed=passed, total=total)


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_pools):
        pool.close()


def _forget_all() -> None:
    """Close the sockets in a process that was forked from this one."""
    for pool in list(_pools):
        for sandbox in pool._open:
            sandbox.forget()
        pool._lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_all)
