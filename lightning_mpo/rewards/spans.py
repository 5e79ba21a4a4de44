"""Rewards of responses that consist of decisions of several tokens each."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from lightning_mpo.checks import not_below
from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion, Reward, TokenReward

LENGTH = "span_length"
"""Column with the number of tokens of a decision."""


class SpanShare(TokenReward):
    """The share of right decisions, given to the tokens of each decision.

    Characters are tokens here, as with `TinyPolicy`. A decision is right if its characters equal
    those of the target at the same place. A right decision has the reward 1 / (number of decisions),
    in equal parts at its tokens. The noise of a token has mean 0. It sums to 0 over a decision, so
    that the reward of a decision is exact. A decision of one token has no noise.

    Args:
        noise: standard deviation of a token's noise, divided by the reward of a right decision.
        weight: factor of this reward in the sum.

    Raises:
        UserError: `noise` is negative or above 1000, or the weight is not a number.
    """

    def __init__(self, noise: float = 0.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        not_below(type(self).__name__, 0, most=1000, noise=noise)
        self.noise = noise

    def token_scores(self, completions: Sequence[Completion]) -> list[list[float]]:
        return [self._score(completion) for completion in completions]

    def check_columns(self, columns: Sequence[str]) -> None:
        check_length_column(self.title, columns)

    def _score(self, completion: Completion) -> list[float]:
        scores, length = [0.0] * len(completion.token_ids), completion.row[LENGTH]
        right = right_decisions(completion)
        for i, is_right in enumerate(right):
            # the tokens of decision i that the response has
            tokens = range(i * length, min((i + 1) * length, len(scores)))
            noise = self._noise(len(tokens))
            for t, share in zip(tokens, noise, strict=True):
                scores[t] = (is_right / len(tokens) + share) / len(right)
        return scores

    def _noise(self, tokens: int) -> list[float]:
        """Return noise of deviation `noise` that sums to 0, for the tokens of one decision."""
        if not self.noise or tokens < 2:
            return [0.0] * tokens
        drawn = [random.gauss(0, 1) for _ in range(tokens)]
        mean = sum(drawn) / tokens
        scale = self.noise * (tokens / (tokens - 1)) ** 0.5
        return [scale * (x - mean) for x in drawn]


class DrawnDecision(Reward):
    """1 if one decision of the response is right, else 0; a hash of the prompt chooses the decision.

    pass@1 is then an estimate of the share of right decisions. "All decisions are right" would give
    nearly 0 for all but perfect policies. "More than half are right" would jump from 0 to 1.

    Args:
        weight: factor of this reward in the sum; 0: it is measured and not trained on.

    Raises:
        UserError: the weight is not a number, or beyond 1e9.
    """

    is_accuracy = True

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__(weight)

    def score(self, completions: Sequence[Completion]) -> list[float]:
        return [float(self._is_right(completion)) for completion in completions]

    def check_columns(self, columns: Sequence[str]) -> None:
        check_length_column(self.title, columns)

    @staticmethod
    def _is_right(completion: Completion) -> bool:
        right = right_decisions(completion)
        digest = hashlib.sha256(completion.prompt.encode()).digest()
        return right[int.from_bytes(digest[8:16], "big") % len(right)]


def right_decisions(completion: Completion) -> list[bool]:
    """Return for each decision of the target whether the response has it at the same place.

    Args:
        completion: with `text`, `target`, and the length of a decision in its `row`.

    Example:
        >>> done = Completion("p", "aixbj", "aibj", 6, True, {"span_length": 2})
        >>> right_decisions(done)
        [True, False]
    """
    length, target, text = completion.row[LENGTH], completion.target, completion.text
    return [text[i : i + length] == target[i : i + length] for i in range(0, len(target), length)]


def check_length_column(title: str, columns: Sequence[str]) -> None:
    """Refuse data without the length of decisions.

    Args:
        title: name of the reward, for the message.
        columns: names of the columns of the data.

    Raises:
        UserError: the column is missing.
    """
    if LENGTH not in columns:
        raise UserError(
            f"`{title}` reads the column `{LENGTH}`, the number of tokens of a decision, which the "
            "data lack; use it with the data `Spans` (-c spans)"
        )
