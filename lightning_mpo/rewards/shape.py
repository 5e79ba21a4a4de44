"""Rewards on the form of a response."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_mpo.checks import at_least, positive
from lightning_mpo.errors import UserError
from lightning_mpo.functional.lengths import overlong_penalty
from lightning_mpo.rewards.base import Completion, Reward


class Finished(Reward):
    """1 if the response ended by itself, 0 if `max_new_tokens` cut it off.

    Use it beside a reward of the answer.

    Args:
        weight: factor of this reward in the sum.
    """

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [float(completion.finished) for completion in completions]


class OverlongPenalty(Reward):
    """DAPO's soft punishment of long responses.

    It is 0 up to `limit - buffer` tokens, `-factor` at `limit`, and linear between.

    The end token counts. Use it beside a reward of the answer; dynamic sampling ignores it.

    Args:
        limit: length in tokens from which the whole penalty applies, usually
            `"${rollout.max_new_tokens}"`; DAPO takes 20480.
        buffer: tokens before the limit over which the penalty grows; DAPO takes 4096.
        factor: size of the whole penalty.
        weight: factor of this reward in the sum.
    """

    def __init__(self, limit: int, buffer: int, factor: float = 1.0, weight: float = 1.0) -> None:
        at_least("OverlongPenalty", 1, limit=limit)
        if not 1 <= buffer <= limit:
            raise UserError(
                f"`OverlongPenalty.buffer` must be between 1 and `limit` = {limit}, got {buffer}"
            )
        positive("OverlongPenalty", factor=factor, note=": it is taken off")
        super().__init__(weight)
        self.limit, self.buffer, self.factor = limit, buffer, factor

    def check(self, max_new_tokens: int) -> None:
        if max_new_tokens <= self.limit - self.buffer:
            raise UserError(
                f"`OverlongPenalty` begins after {self.limit - self.buffer} tokens (`limit - "
                "buffer`), and no response is longer than `rollout.max_new_tokens` = "
                f"{max_new_tokens}; give `limit: ${{rollout.max_new_tokens}}`"
            )

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        lengths = torch.tensor([float(completion.tokens) for completion in completions])
        return list(overlong_penalty(lengths, self.limit, self.buffer, self.factor).tolist())
