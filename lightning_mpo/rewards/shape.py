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


class LengthRange(Reward):
    """1 if the response has from `shortest` to `longest` tokens, else 0.

    The end token counts. Use it beside a reward of the answer.

    Args:
        shortest: fewest tokens.
        longest: most tokens.
        weight: factor of this reward in the sum.

    Raises:
        UserError: the range is empty.
    """

    def __init__(self, shortest: int, longest: int, weight: float = 1.0) -> None:
        super().__init__(weight)
        at_least("LengthRange", 0, shortest=shortest)
        at_least("LengthRange", shortest, longest=longest)
        self.shortest, self.longest = shortest, longest

    def check(self, max_new_tokens: int) -> None:
        if max_new_tokens < self.shortest:
            raise UserError(
                f"`LengthRange.shortest` is {self.shortest}, and no response is longer than "
                f"`rollout.max_new_tokens` = {max_new_tokens}"
            )

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [float(self.shortest <= c.tokens <= self.longest) for c in completions]


class LengthCost(Reward):
    """A cost of each token: `-per_token · tokens`.

    The end token counts. Use it beside a reward of the answer.

    Args:
        per_token: cost of a token, in units of the reward.
        weight: factor of this reward in the sum.

    Raises:
        UserError: `per_token` is not positive.
    """

    def __init__(self, per_token: float, weight: float = 1.0) -> None:
        super().__init__(weight)
        positive("LengthCost", per_token=per_token, note=": it is taken off")
        self.per_token = per_token

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [-self.per_token * c.tokens for c in completions]


class RepetitionPenalty(Reward):
    """A penalty on repeated n-grams of tokens.

        R = -factor · (1 - distinct n-grams / all n-grams)     0 with fewer than `size` tokens

    This is the penalty of arXiv:2502.03373 as Open-R1 has it [C], with tokens for words [I].

    Args:
        size: n, tokens of an n-gram.
        factor: size of the whole penalty.
        weight: factor of this reward in the sum.

    Raises:
        UserError: `size` is below 1, or `factor` not positive.
    """

    def __init__(self, size: int = 4, factor: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        at_least("RepetitionPenalty", 1, size=size)
        positive("RepetitionPenalty", factor=factor, note=": it is taken off")
        self.size, self.factor = size, factor

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [-self.factor * repeated_share(c.token_ids, self.size) for c in completions]


def repeated_share(items: Sequence[int], size: int) -> float:
    """Return the share of n-grams that repeat an earlier one: `1 - distinct / all`.

    Args:
        items: ids of tokens.
        size: n.

    Example:
        >>> repeated_share([1, 2, 1, 2, 1, 2], 2), repeated_share([1, 2], 3)
        (0.6, 0.0)
    """
    grams = [tuple(items[i : i + size]) for i in range(len(items) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
