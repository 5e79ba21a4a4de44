"""Helper processes for the rewards of a user, which can then neither hang nor change the run.

A first process, the spawner, is forked before a model is loaded. It forks the helpers, also later:
a process that uses a GPU must not fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import pickle
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NoReturn

from lightning_mpo.rewards.base import Completion, Judgement, Reward, RewardError
from lightning_mpo.rewards.calling import judge
from lightning_mpo.rewards.isolation import describe, overdue

QUIET = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals to all processes of a run, which a helper ignores."""
TURN = 0.5
"""Seconds of one wait for a helper. Ctrl-C is handled after at most that long."""

_open: weakref.WeakSet[Spawner | Helper] = weakref.WeakSet()
"""The processes of this process."""


def _close_inherited_pipes() -> None:
    """Close the pipes of the run in a process that was forked from it."""
    for process in list(_open):
        process.pipe.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_inherited_pipes)


class Spawner:
    """The process that forks helpers, and the pipe to it.

    Args:
        rewards: rewards that a helper can call.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self.pipe, theirs = Pipe()
        self.owner = os.getpid()
        with warnings.catch_warnings():
            # the warning of a fork beside threads: the child runs Python alone
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _spawn(rewards, theirs, self.owner)
        theirs.close()
        _open.add(self)
        self.close = weakref.finalize(self, _end, self.pid, self.owner, self.pipe)

    def fork(self) -> tuple[int, Connection]:
        """Fork a helper; return its id and the pipe to it.

        Raises:
            OSError, EOFError: the spawner has ended.
        """
        self.pipe.send(0)
        return self.pipe.recv(), Connection(recv_handle(self.pipe))

    def status(self, pid: int) -> int | None:
        """Return the exit status of a helper that ends; None: not known."""
        with contextlib.suppress(OSError, EOFError):
            self.pipe.send(pid)
            return self.pipe.recv()
        return None


class Helper:
    """A helper process, and the pipe to it.

    Args:
        spawner: forks it.

    Raises:
        OSError, EOFError: the spawner has ended.
    """

    def __init__(self, spawner: Spawner) -> None:
        self.owner = os.getpid()
        self.pid, self.pipe = spawner.fork()
        self._spawner = spawner
        _open.add(self)
        self._end = weakref.finalize(self, _end, self.pid, self.owner, self.pipe, spawner)

    @property
    def alive(self) -> bool:
        """Whether the process was not ended."""
        return bool(self._end.alive)

    def ask(
        self, position: int, reward: Reward, completions: Sequence[Completion], seconds: float
    ) -> Judgement:
        """Have the process judge completions.

        Args:
            position: index of the reward in the list that the process has.
            reward: the reward, for messages.
            completions: B responses.
            seconds: time limit.

        Raises:
            RewardError: the reward raised, ended the process, took too long, or returned no numbers.
        """
        # send
        try:
            question = pickle.dumps((position, list(completions)))
        except Exception as error:
            raise RewardError(
                f"the rows cannot be sent to the helper process of reward `{reward.title}` "
                f"({describe(error)}); set `rollout.reward_process: false`"
            ) from error
        # receive
        try:
            end = time.monotonic() + seconds  # the limit counts from the question on
            self.pipe.send_bytes(question)
            if not self._replies(end):
                raise overdue(reward, len(completions), seconds)
            reply = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            status = self._spawner.status(self.pid)
            self.close()
            raise RewardError(f"reward `{reward.title}` {_why(status)}") from None
        except BaseException:  # a late reply would be read as that of the next question
            self.close()
            raise
        if "error" in reply:
            raise RewardError(reply["error"])
        return Judgement(**reply)

    def _replies(self, end: float) -> bool:
        """Wait for a reply in short turns: a signal just before a wait is handled only after it."""
        while not self.pipe.poll(max(0.0, min(TURN, end - time.monotonic()))):
            if time.monotonic() >= end:
                return False
        return True

    def close(self) -> None:
        """End the process and all processes that it started."""
        self._end()


def _end(pid: int, owner: int, pipe: Connection, spawner: Spawner | None = None) -> None:
    """End a child of this process, or of the spawner, with its group."""
    pipe.close()
    if os.getpid() != owner:
        return
    for kill in (os.killpg, os.kill):  # a process that has just started leads no group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    if spawner is not None:
        spawner.status(pid)
        return
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _why(status: int | None) -> str:
    """Return the end of a process as the end of a sentence."""
    if status is None:
        return "ended its process"
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"crashed its process with {name}{hint}"
    return f"ended its process with exit code {os.WEXITSTATUS(status)}; a reward must return"


# --- the other side of the pipes ------------------------------------------------------------------


def _spawn(rewards: Sequence[Reward], pipe: Connection, parent: int) -> NoReturn:
    """Fork helpers, and tell how they ended, until the pipe is closed. It never returns."""
    try:
        _settle(pipe, parent)
        while True:
            pid = pipe.recv()
            if pid:
                pipe.send(_status(pid))
                continue
            ours, theirs = Pipe()
            pid = os.fork()
            if pid == 0:
                ours.close()
                _serve(rewards, theirs, os.getppid())
            theirs.close()
            pipe.send(pid)
            send_handle(pipe, ours.fileno(), parent)
            ours.close()
    finally:
        os._exit(0)


def _status(pid: int) -> int | None:
    """Wait up to two seconds for the end of a child: it may close its pipe and go on."""
    with contextlib.suppress(ChildProcessError):
        for _ in range(100):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.02)
    return None


def _serve(rewards: Sequence[Reward], pipe: Connection, parent: int) -> NoReturn:
    """Answer until the pipe is closed. It never returns, so no other code of the parent runs."""
    try:
        _settle(pipe, parent)
        while True:
            try:
                question = pipe.recv_bytes()
            except (EOFError, OSError):
                os.killpg(0, signal.SIGKILL)  # ends workers that rewards left behind as well
            position, completions = pickle.loads(question)
            try:
                reply: dict[str, Any] = judge(rewards[position], completions)._asdict()
            except RewardError as error:
                reply = {"error": str(error)}
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            pipe.send_bytes(json.dumps(reply).encode())
    finally:
        os._exit(1)


def _settle(pipe: Connection, parent: int) -> None:
    """Separate the process from its parent: session, signals, standard input.

    It ends when the parent ends.
    """
    os.setsid()
    owner = os.getpid()

    def ignore(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a worker of a reward's pool: signals end it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in QUIET:
        signal.signal(number, ignore)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    faulthandler.disable()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = os.fdopen(0, closefd=False)
    os.register_at_fork(after_in_child=pipe.close)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)
