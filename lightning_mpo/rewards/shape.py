"""Rewards on the form of a response."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mpo.rewards.base import Completion, Reward


class Finished(Reward):
    """1 if the response ended by itself, 0 if `max_new_tokens` cut it off. A graded part beside an answer's reward.

    Args:
        weight: factor of this reward in the sum.
    """

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [float(completion.finished) for completion in completions]
