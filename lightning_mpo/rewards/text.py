"""Rewards that compare strings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion, Reward
from lightning_mpo.rewards.thoughts import after_thoughts


class ExactAnswer(Reward):
    """1 if the text after the last `separator` equals the target, else 0.

    A response that did not finish gets 0.

    Surrounding white space and zeros at the end of a decimal do not count: 72.0 equals 72. After
    thoughts, only the text behind `</think>` is read. A row with an empty target is not judged.

    Args:
        separator: the text before the answer; None: the whole response is the answer.
        weight: factor of this reward in the sum.
    """

    is_accuracy = True

    def __init__(self, separator: str | None = ";", weight: float = 1.0) -> None:
        super().__init__(weight)
        if separator == "":
            raise UserError(
                "`ExactAnswer.separator` must not be empty: it marks where the answer begins, "
                "such as `####`; write null if the whole response is the answer"
            )
        self.separator = separator

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [self._score(completion) for completion in completions]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        return [self._answer(completion) is not None for completion in completions]

    def _score(self, completion: Completion) -> float | None:
        target = completion.target.strip()
        if not target:
            return None
        answer = self._answer(completion)
        return float(
            completion.finished and answer is not None and _plain(answer) == _plain(target)
        )

    def _answer(self, completion: Completion) -> str | None:
        text = after_thoughts(completion.text, completion.thinking) or ""
        if self.separator is None:
            return text.strip() or None
        return (
            text.rpartition(self.separator)[2].strip() or None if self.separator in text else None
        )


def _plain(text: str) -> str:
    """Write a decimal without trailing zeros: pandas writes 72 as 72.0 if its column has gaps.

    Example:
        >>> _plain("72.0"), _plain("-0.50"), _plain("1.2.0")
        ('72', '-0.5', '1.2.0')
    """
    if not re.fullmatch(r"-?\d+\.\d+", text):
        return text
    plain = text.rstrip("0").rstrip(".")
    return "0" if plain == "-0" else plain
