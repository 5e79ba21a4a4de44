"""Calls one reward and checks its result: one finite number or None for each completion."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.rewards.base import Completion, Judgement, Reward, RewardError, TokenReward
from lightning_mpo.rewards.isolation import OverdueError, blamed, limited, undisturbed


def judge(
    reward: Reward, completions: Sequence[Completion], seconds: float | None = None
) -> Judgement:
    """Call a reward in this process.

    The working folder, torch's defaults and the random states are restored afterwards. Random
    numbers in a reward depend on the seed of the run and on the completions alone, so a resumed run
    draws the same.

    Args:
        reward: the reward to call.
        completions: B responses.
        seconds: time limit. It works in the main thread only and does not interrupt C code. None:
            no limit.

    Returns:
        A score and a flag "answered" for each completion; of a `TokenReward` also a score for each
        token.

    Raises:
        RewardError: the reward raised, took too long, returned a value that is not a finite number,
            or returned a wrong count.
    """
    with undisturbed(completions), limited(reward, len(completions), seconds):
        token_scores = errors = None
        if isinstance(reward, TokenReward):
            token_scores = _token_scores(reward, completions)
            scores = [None if values is None else math.fsum(values) for values in token_scores]
        else:
            scores, errors = _scores(reward, completions)
        answered = [bool(value) for value in _call(reward, "answered", completions)]
    return Judgement(scores, answered, token_scores, errors)


def _scores(
    reward: Reward, completions: Sequence[Completion]
) -> tuple[list[float | None], list[str | None] | None]:
    """Return a score for each completion, and the errors of those on which the reward failed."""
    scores: list[float | None] = []
    values = _call(reward, "score", completions)
    errors = [str(value) if isinstance(value, RewardError) else None for value in values]
    values = [None if isinstance(value, RewardError) else value for value in values]
    for completion, value in zip(completions, values, strict=True):
        try:
            scores.append(None if value is None else _number(value))
        except _NotANumberError as error:
            _close(values)
            raise RewardError(
                f"reward `{reward.title}` returned {_show(value)} for completion {len(scores)} "
                f"({completion.text[:40]!r}); {error}"
            ) from None
    return scores, errors if any(errors) else None


def _token_scores(
    reward: TokenReward, completions: Sequence[Completion]
) -> list[list[float] | None]:
    """Call `reward.token_scores` and check one number per token."""
    subject = f"reward `{reward.title}`, in `token_scores`,"
    scores: list[list[float] | None] = []
    rows = _call(reward, "token_scores", completions)
    for index, (completion, row) in enumerate(zip(completions, rows, strict=True)):
        # a list, or None: not judged
        if row is None:
            scores.append(None)
            continue
        place, count = f"completion {index} ({completion.text[:40]!r})", len(completion.token_ids)
        with blamed(subject):
            values = _as_list(row, count)
        if values is None:
            _close(rows)
            raise RewardError(
                f"{subject} must return a list of {count} numbers for {place}, or None, got "
                f"{type(row).__name__}"
            )
        # one number per token
        if len(values) != count:
            unbounded = len(values) > count and not hasattr(row, "__len__")
            raise RewardError(
                f"{subject} must return one number per token ({count}) of {place}, got "
                f"{'more' if unbounded else len(values)}"
            )
        scores.append([_of_token(subject, t, value, place) for t, value in enumerate(values)])
    return scores


def _of_token(subject: str, position: int, value: Any, place: str) -> float:
    """Return the number of a token as a float."""
    try:
        return _number(value)
    except _NotANumberError as error:
        raise RewardError(
            f"{subject} returned {_show(value)} for token {position} of {place}; {error}"
        ) from None


class _NotANumberError(Exception):
    """Its message advises a value to return instead."""


def _number(value: Any) -> float:
    """Return the value as a float that float32 can hold."""
    advice = "return a finite number, or None where there is nothing to judge"
    too_large = "float32 holds numbers up to 3.4e38; scale the reward down"
    # convert
    if isinstance(value, str | bytes | bytearray | complex):
        raise _NotANumberError(advice)
    try:
        number = float(value)
    except OverflowError:
        raise _NotANumberError(too_large) from None
    except OverdueError:
        raise
    except BaseException:
        raise _NotANumberError(advice) from None
    # check that nothing is lost
    if not math.isfinite(number):
        raise _NotANumberError(advice)
    if abs(number) > 3.4e38 and not torch.tensor(number, dtype=torch.float64).float().isfinite():
        raise _NotANumberError(too_large)
    if isinstance(value, numbers.Integral) and int(value) != int(number):
        raise _NotANumberError(
            "a float does not hold all digits of this integer; scale the reward down"
        )
    return number


def _call(reward: Reward, method: str, completions: Sequence[Completion]) -> list[Any]:
    """Call a method of a reward; return its result as a list with one value per completion."""
    subject = f"reward `{reward.title}`" + ("" if method == "score" else f", in `{method}`,")
    # call the method; a coroutine is awaited
    with blamed(subject):
        raw = getattr(reward, method)(completions)
        if inspect.isawaitable(raw):
            raw = _wait(raw)
        values = _as_list(raw, len(completions))
    # refuse another type
    kind = {"score": "numbers", "token_scores": "lists of numbers"}.get(method, "booleans")
    if values is None:
        _close([raw])
        raise RewardError(
            f"{subject} must return a list of {len(completions)} {kind}, got {type(raw).__name__}"
        )
    # refuse another count
    if len(values) != len(completions):
        _close(values)
        unbounded = len(values) > len(completions) and not hasattr(raw, "__len__")
        one = "list" if method == "token_scores" else "number"
        raise RewardError(
            f"{subject} must return one {one} per completion ({len(completions)}), "
            f"got {'more' if unbounded else len(values)}"
        )
    return values


def _as_list(raw: Any, count: int) -> list[Any] | None:
    """Return the values of a reward as a list of at most `count` + 1; None: they have no order."""
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
