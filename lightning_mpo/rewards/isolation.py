"""Calls a reward so that it can neither change the state of the process nor run without an end."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lightning_mpo.rewards.base import Completion, Reward, RewardError

LIBRARIES = [
    Path(__file__).parents[1],
    *map(Path, {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}),
]
"""Folders whose code is not the user's: this package, Python and installed packages."""


class OverdueError(BaseException):
    """The time limit has passed. A reward that catches every `Exception` does not catch it."""


@contextmanager
def blamed(subject: str) -> Iterator[None]:
    """Turn an exception of a reward into one line; the Ctrl-C of a user passes through.

    Args:
        subject: the reward, as the message names it.
    """
    # tell the Ctrl-C of a user from a KeyboardInterrupt that the reward raises
    interrupts: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT) if in_main_thread else None
    if callable(previous):

        def record(number: int, frame: Any) -> None:
            interrupts.append(number)
            previous(number, frame)

        signal.signal(signal.SIGINT, record)
    # run the reward
    try:
        yield
    except (OverdueError, RewardError):
        raise
    except BaseException as error:
        if interrupts and isinstance(error, KeyboardInterrupt):
            raise
        raise RewardError(f"{subject} raised {describe(error)}{_place(error)}") from error
    finally:
        if callable(previous):
            signal.signal(signal.SIGINT, previous)


def _place(error: BaseException) -> str:
    """Return the line of the user's code that raised: the innermost one outside of packages."""
    place, trace = "", error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_absolute() and not any(path.is_relative_to(folder) for folder in LIBRARIES):
            here = working_folder()
            shown = (
                path.relative_to(here) if here is not None and path.is_relative_to(here) else path
            )
            place = f" ({shown}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place


def describe(error: BaseException) -> str:
    """Write an exception as one line of bounded length."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    text = text if len(text) <= 300 else text[:300] + " …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def limited(reward: Reward, count: int, seconds: float | None) -> Iterator[None]:
    """End a call that takes too long, by a signal in the main thread.

    Args:
        reward: the reward that is called.
        count: number of completions, for the message.
        seconds: time limit; None: no limit.

    Raises:
        RewardError: the time limit has passed.
    """
    # a limit needs the main thread, and a timer that nobody else uses
    in_main_thread = threading.current_thread() is threading.main_thread()
    if seconds is None or not in_main_thread or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise OverdueError

    # the signal comes again each second, as a bare `except` may swallow the first
    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            yield
        finally:  # the signal may still come here
            signal.setitimer(signal.ITIMER_REAL, 0)
    except OverdueError:
        raise overdue(reward, count, seconds) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def overdue(reward: Reward, count: int, seconds: float) -> RewardError:
    """Return the error of a reward that takes longer than its limit."""
    return RewardError(
        f"reward `{reward.title}` took more than {seconds:g} seconds for {count} completions, the "
        "limit of `rollout.reward_seconds`; make it faster or raise the limit"
    )


@contextmanager
def undisturbed(completions: Sequence[Completion]) -> Iterator[None]:
    """Restore the process state that a reward may change, and seed its random numbers."""
    # record the state
    numpy = sys.modules.get("numpy")
    folder = working_folder()
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = None if numpy is None else numpy.random.get_state()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    threads = torch.get_num_threads()
    # seed each generator
    seed = _seed(completions)
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    # run the reward, then restore what it changed
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        random.setstate(python_state)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_rng_state(torch_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if folder is not None and working_folder() != folder:
            with suppress(OSError):
                os.chdir(folder)


def working_folder() -> str | None:
    """Return the working folder; None: it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _seed(completions: Sequence[Completion]) -> int:
    """Return a seed that depends on the seed of the run and on the completions alone."""
    digest = hashlib.sha256(os.environ.get("PL_GLOBAL_SEED", "0").encode())
    for completion in completions:
        digest.update(f"{completion.prompt}\0{completion.text}\0".encode(errors="surrogatepass"))
    return int.from_bytes(digest.digest()[:7], "big")
