"""Rewards that compare strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lightning_mpo.rewards.base import Completion, Reward


class ExactAnswer(Reward):
    """1 if what stands after the last `separator` equals the target, else 0; a response that did not finish gets 0.

    Args:
        separator: the text before the answer.
        weight: factor of this reward in the sum.
    """

    is_accuracy: ClassVar[bool] = True

    def __init__(self, separator: str = ";", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.separator = separator

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [float(c.finished and self._answer(c.text) == c.target) for c in completions]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        return [self._answer(c.text) is not None for c in completions]

    def _answer(self, text: str) -> str | None:
        _, found, answer = text.rpartition(self.separator)
        return answer.strip() if found else None
