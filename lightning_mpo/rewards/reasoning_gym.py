"""The verifiers of the package reasoning-gym, as a reward."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion, Reward
from lightning_mpo.rewards.thoughts import after_thoughts

COLUMN = "reasoning_gym"
"""Column of the data `ReasoningGym`: name and options of the task, and the problem as it made it."""


class ReasoningGymAnswer(Reward):
    """The score of the task's own verifier, from 0 to 1; for the data `ReasoningGym`.

    The answer is the content of the last `<answer>…</answer>`, else the whole response. After
    thoughts, only the text behind `</think>` is read. A response that was cut off gets 0, and so
    does an answer on which the verifier raises. Verifiers are code of another package that may
    evaluate an answer, so the command line runs them in the helper process of
    `rollout.reward_process`.

    Args:
        weight: factor of this reward in the sum.

    Raises:
        UserError: the weight is not a number, or beyond 1e9.
    """

    is_accuracy = True
    runs_foreign_code = True

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [self._score(completion) for completion in completions]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        return [bool(answer_of(completion)) for completion in completions]

    def check_columns(self, columns: Sequence[str]) -> None:
        if COLUMN not in columns:
            raise UserError(f"`{self.title}` checks answers to the data `ReasoningGym` alone")

    def _score(self, completion: Completion) -> float | None:
        problem: Mapping[str, Any] = completion.row[COLUMN]
        if not completion.finished:
            return 0.0
        task = cached_task(problem["task"], json.dumps(problem["options"], sort_keys=True))
        try:
            return float(task.score_answer(answer_of(completion), problem["entry"]))
        except Exception:  # a verifier may raise any exception on an answer in another form
            return 0.0


def answer_of(completion: Completion) -> str:
    """Return the answer of a response, which may be wrong; empty: there is none."""
    text = after_thoughts(completion.text, completion.thinking) or ""
    before, closed, _ = text.rpartition("</answer>")
    return (before.rpartition("<answer>")[2] if closed else text).strip()


@lru_cache(maxsize=32)
def cached_task(name: str, options: str) -> Any:
    """Return `make_task` for options in JSON."""
    return make_task(name, json.loads(options))


def make_task(name: str, options: Mapping[str, Any]) -> Any:
    """Return a task of reasoning-gym.

    Args:
        name: such as `chain_sum`.
        options: fields of its configuration.

    Raises:
        UserError: the package is not installed, or it has no such task or option.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(
            f"`ReasoningGym` needs the package reasoning-gym ({error}): install it by "
            "`pip install 'lightning-mpo[reasoning-gym]'`"
        ) from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(f"`ReasoningGym.task`: reasoning-gym has no task {name!r}{hint}")
    try:
        return reasoning_gym.create_dataset(name, **options)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"`ReasoningGym.options` of {name!r} are not valid: {reason}") from error
