"""Calls one reward, protects the state of the process from it, and checks its result."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import itertools
import math
import numbers
import os
import random
import signal
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.rewards.base import Completion, Judgement, Reward, RewardError

LIBRARIES = [
    Path(__file__).parents[1],
    *map(Path, {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}),
]
"""Folders whose code is not the user's: this package, Python and what is installed."""


class _OverdueError(BaseException):
    """The time limit has passed. It is no `Exception`, so a reward that catches those does not catch it."""


def judge(
    reward: Reward, completions: Sequence[Completion], seconds: float | None = None
) -> Judgement:
    """Call a reward in this process.

    The working folder, torch's defaults and the random states are restored afterwards. Random numbers in a reward depend
    on the run's seed and the completions alone, so a resumed run draws the same.

    Args:
        reward: the reward to call.
        completions: B responses.
        seconds: time limit. It works in the main thread only and does not interrupt C code. None: no limit.

    Returns:
        A score and a flag "answered" for each completion.

    Raises:
        RewardError: the reward raised, took too long, returned a value that is not a finite number, or a wrong count.
    """
    with _undisturbed(completions), _limited(reward, len(completions), seconds):
        scores = _scores(reward, completions)
        answered = [bool(value) for value in _call(reward, "answered", completions)]
    return Judgement(scores, answered)


def _scores(reward: Reward, completions: Sequence[Completion]) -> list[float | None]:
    scores: list[float | None] = []
    values = _call(reward, "score", completions)
    for completion, value in zip(completions, values, strict=True):
        try:
            scores.append(None if value is None else _number(value))
        except _NotANumberError as error:
            _close(values)
            raise RewardError(
                f"reward `{reward.title}` returned {_show(value)} for completion {len(scores)} "
                f"({completion.text[:40]!r}); {error}"
            ) from None
    return scores


class _NotANumberError(Exception):
    """Its message is advice on what to return instead."""


def _number(value: Any) -> float:
    """Return a float that float32 can hold."""
    advice = "return a finite number, or None where there is nothing to judge"
    if isinstance(value, str | bytes | bytearray | complex):
        raise _NotANumberError(advice)
    too_large = "float32 holds numbers up to 3.4e38; scale the reward down"
    try:
        number = float(value)
    except OverflowError:
        raise _NotANumberError(too_large) from None
    except _OverdueError:
        raise
    except BaseException:
        raise _NotANumberError(advice) from None
    if not math.isfinite(number):
        raise _NotANumberError(advice)
    if not torch.tensor(number, dtype=torch.float64).float().isfinite():
        raise _NotANumberError(too_large)
    if isinstance(value, numbers.Integral) and int(value) != int(number):
        raise _NotANumberError(
            "a float does not hold all digits of this integer; scale the reward down"
        )
    return number


def _call(reward: Reward, method: str, completions: Sequence[Completion]) -> list[Any]:
    """Call `reward.score` or `reward.answered`; return its result as a list of the right length."""
    who = f"reward `{reward.title}`" + ("" if method == "score" else f", in `{method}`,")
    with _blamed(who):
        raw = getattr(reward, method)(completions)
        if inspect.isawaitable(raw):
            raw = _wait(raw)
        values = _listed(raw, len(completions))
    kind = "numbers" if method == "score" else "booleans"
    if values is None:
        _close([raw])
        raise RewardError(
            f"{who} must return a list of {len(completions)} {kind}, got {type(raw).__name__}"
        )
    if len(values) != len(completions):
        _close(values)
        more = (
            "more"
            if len(values) > len(completions) and not hasattr(raw, "__len__")
            else len(values)
        )
        raise RewardError(
            f"{who} must return one number per completion ({len(completions)}), got {more}"
        )
    return values


def _listed(raw: Any, count: int) -> list[Any] | None:
    """Return the result of a reward as a list, with at most one value too many; None: it has no order."""
    if isinstance(raw, Tensor):
        return list(raw.detach().cpu()) if raw.ndim else None
    if isinstance(raw, str | bytes | bytearray | Mapping | AbstractSet) or not isinstance(
        raw, Iterable
    ):
        return None
    return list(raw) if hasattr(raw, "__len__") else list(itertools.islice(raw, count + 1))


def _wait(awaitable: Any) -> Any:
    """Run a coroutine to its end, also in a notebook, where an event loop is already running."""

    async def run() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, run()).result()


def _close(values: Sequence[Any]) -> None:
    """Close coroutines that are not awaited; Python would warn of them."""
    for value in values:
        if inspect.iscoroutine(value):
            value.close()


def _show(value: Any) -> str:
    try:
        return f"{value!r:.40}".replace("\n", " ")
    except BaseException:
        return f"an object of type {type(value).__name__}"


@contextmanager
def _blamed(who: str) -> Iterator[None]:
    """Turn an exception of a reward into one line; the Ctrl-C of a user passes through."""
    pressed: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if main else None
    if callable(before):

        def note(number: int, frame: Any) -> None:
            pressed.append(number)
            before(number, frame)

        signal.signal(signal.SIGINT, note)
    try:
        yield
    except (_OverdueError, RewardError):
        raise
    except BaseException as error:
        if pressed and isinstance(error, KeyboardInterrupt):
            raise
        raise RewardError(f"{who} raised {describe(error)}{_place(error)}") from error
    finally:
        if callable(before):
            signal.signal(signal.SIGINT, before)


def _place(error: BaseException) -> str:
    """Return the line of the user's code that an exception comes from: the innermost outside packages."""
    place, trace = "", error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_absolute() and not any(path.is_relative_to(folder) for folder in LIBRARIES):
            here = _folder()
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
def _limited(reward: Reward, count: int, seconds: float | None) -> Iterator[None]:
    """End a call that takes too long, by a signal in the main thread."""
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise _OverdueError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, where a bare `except` swallows it
    try:
        yield
    except _OverdueError:
        raise overdue(reward, count, seconds) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def overdue(reward: Reward, count: int, seconds: float) -> RewardError:
    """Return the error of a reward that takes longer than its limit."""
    return RewardError(
        f"reward `{reward.title}` took more than {seconds:g} seconds for {count} completions, the limit of "
        "`rollout.reward_seconds`; make it faster or raise the limit"
    )


@contextmanager
def _undisturbed(completions: Sequence[Completion]) -> Iterator[None]:
    """Restore the process state that a reward may change, and seed its random numbers."""
    numpy = sys.modules.get("numpy")
    folder, states = _folder(), (random.getstate(), torch.get_rng_state())
    numpy_state = None if numpy is None else numpy.random.get_state()
    dtype, device, threads = (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
    )
    seed = _seed(completions)
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        random.setstate(states[0])
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_rng_state(states[1])
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if folder is not None and _folder() != folder:
            with suppress(OSError):
                os.chdir(folder)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


def _seed(completions: Sequence[Completion]) -> int:
    digest = hashlib.sha256(os.environ.get("PL_GLOBAL_SEED", "0").encode())
    for completion in completions:
        digest.update(f"{completion.prompt}\0{completion.text}\0".encode(errors="surrogatepass"))
    return int.from_bytes(digest.digest()[:7], "big")
