"""A helper process for the rewards of a user, which can then neither hang nor change the run."""

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
from typing import Any, NoReturn

import torch

from lightning_mpo.rewards.base import Completion, Judgement, Reward, RewardError
from lightning_mpo.rewards.calling import judge
from lightning_mpo.rewards.functions import FunctionReward
from lightning_mpo.rewards.isolation import describe, overdue

QUIET = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals to all processes of a run, which the helper ignores."""
TURN = 0.5
"""Seconds of one wait for the helper. Ctrl-C is handled after at most that long."""


class RewardCaller:
    """Calls rewards: built-in ones in this process, those of a user in a helper process.

    The helper is a fork, so rewards need not be picklable. It is made before a model is loaded, and
    ends with this process, however that ends.

    Args:
        rewards: all rewards of a run.
        seconds: time limit of one call.
        process: run the user's rewards in a helper process.
    """

    def __init__(self, rewards: Sequence[Reward], seconds: float, process: bool) -> None:
        self.rewards, self.seconds = list(rewards), seconds
        self.process = process and any(is_of_user(reward) for reward in rewards)
        self._helper: _Helper | None = None
        if self.process:
            self.start()

    def __call__(self, reward: Reward, completions: Sequence[Completion]) -> Judgement:
        """Judge completions by one reward.

        Raises:
            RewardError: it raised, ended its process, took too long, or did not return one number
                per completion.
        """
        # in this process
        if not self.process or not is_of_user(reward):
            return judge(reward, completions, self.seconds if is_of_user(reward) else None)
        self.start()
        if self._helper is None:
            return judge(reward, completions, self.seconds)
        # in the helper, which knows rewards by their position
        position = next(i for i, candidate in enumerate(self.rewards) if candidate is reward)
        try:
            return self._helper.ask(position, reward, completions, self.seconds)
        except RewardError:
            if not self._helper.alive:
                self._helper = None
            raise

    def start(self) -> None:
        """Make the helper, unless this process has one."""
        if self._helper is not None and self._helper.owner == os.getpid():
            return
        if torch.cuda.is_initialized():
            warnings.warn(
                "rewards run in the process of the run, as the GPU is already in use; nothing "
                "ends one that hangs in C code",
                stacklevel=2,
            )
            self.process = False
            return
        self._helper = _Helper(self.rewards)

    def close(self) -> None:
        """End the helper."""
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_helper": None}


def is_of_user(reward: Reward) -> bool:
    """Return whether a reward is code of the user."""
    return isinstance(reward, FunctionReward) or not type(reward).__module__.startswith(
        "lightning_mpo."
    )


_open: weakref.WeakSet[_Helper] = weakref.WeakSet()
"""The helpers of this process."""


def _close_inherited_pipes() -> None:
    """Close the pipes of the run in a process that was forked from it."""
    for helper in list(_open):
        helper.pipe.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_inherited_pipes)


class _Helper:
    """The helper process, and the pipe to it."""

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
            _serve(rewards, theirs, self.owner)
        theirs.close()
        _open.add(self)
        self._end = weakref.finalize(self, _end, self.pid, self.owner, self.pipe)

    @property
    def alive(self) -> bool:
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
            self.pipe.send_bytes(question)
            if not self._replies(seconds):
                raise overdue(reward, len(completions), seconds)
            reply = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            raise RewardError(f"reward `{reward.title}` {_why(self._status())}") from None
        except BaseException:  # a late reply would be read as that of the next question
            self.close()
            raise
        if "error" in reply:
            raise RewardError(reply["error"])
        return Judgement(**reply)

    def _replies(self, seconds: float) -> bool:
        """Wait for a reply in short turns: a signal just before a wait is handled only after it."""
        end = time.monotonic() + seconds
        while not self.pipe.poll(max(0.0, min(TURN, end - time.monotonic()))):
            if time.monotonic() >= end:
                return False
        return True

    def close(self) -> int | None:
        """End the process and all processes that it started; return its exit status."""
        return self._end()

    def _status(self) -> int | None:
        """Return the exit status of a process that closed its pipe; None: not known."""
        for _ in range(100):
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if not pid:
                    time.sleep(0.02)
                    continue
                self.close()
                return status
            break
        self.close()
        return None


def _end(pid: int, owner: int, pipe: Connection) -> int | None:
    pipe.close()
    if os.getpid() != owner:
        return None
    for kill in (os.killpg, os.kill):  # a process that has just started leads no group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, 0)[1]
    return None


def _why(status: int | None) -> str:
    """Return the end of a process as the end of a sentence."""
    if status is None:
        return "ended its process"
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"crashed its process with {name}{hint}"
    return f"ended its process with exit code {os.WEXITSTATUS(status)}; a reward must return"


# --- the helper -----------------------------------------------------------------------------------


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
    sys.stdin = os.fdopen(0, closefd=False)
    os.register_at_fork(after_in_child=pipe.close)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)
