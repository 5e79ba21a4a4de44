"""The scores that an objective requests of a policy, and those that a policy returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]
"""By name, (sum of value·weight, sum of weight): what adds up over micro-batches and ranks."""


@dataclass(frozen=True)
class ScoreRequest:
    """Scores of each response token that an objective needs besides log-prob and entropy."""

    entropy_grad: bool = False  # whether the entropy carries gradient
    future: int = 0  # M, offsets to score with multi-token heads
    upkeep: bool = False  # the same once more, with the trunk detached
    values: bool = False  # the critic's values
    support_logits: bool = False  # all logits of the stored support
    candidates: bool = False  # log-probs of the ids that the sampler found most probable

    def __or__(self, other: ScoreRequest) -> ScoreRequest:
        """Return a request for all scores of both."""
        names = [item.name for item in fields(self)]
        return ScoreRequest(
            **{name: max(getattr(self, name), getattr(other, name)) for name in names}
        )


@dataclass(frozen=True)
class TokenScores:
    """What a policy says of a micro-batch's response tokens, under temperature and stored
    support.
    """

    logprobs_BT: Tensor  # float32 nats, carries gradient, 0 where masked
    entropy_BT: Tensor  # float32 nats
    # log q_n(o_{t+n} | h_t), n = 1 … M; 0 where the window has left the mask
    future_BTM: Tensor | None = None
    # the same values; their gradient reaches heads, and weights that heads share with the trunk
    upkeep_BTM: Tensor | None = None
    values_BT: Tensor | None = None  # the critic's, 0 where masked
    # temperature applied, 0 in slots and at positions that are masked
    support_logits_BTK: Tensor | None = None
    # of the rollout's stored candidates, -inf in slots without one
    candidate_logprobs_BTK: Tensor | None = None
    on_support: bool = False  # whether the softmax was taken over stored supports


def join_scores(parts: Sequence[TokenScores]) -> TokenScores:
    """Put scores of consecutive rows together."""
    joined: dict[str, Any] = {}
    for item in fields(TokenScores):
        values = [getattr(part, item.name) for part in parts]
        joined[item.name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
    return TokenScores(**joined)


@dataclass(frozen=True)
class Denominators:
    """Denominators of the whole mini-batch, summed over ranks: of actions for the surrogate, of
    tokens for the loss terms. Also how much there is to learn from.
    """

    actions: Tensor
    tokens: Tensor
    credited: Tensor
    """Tokens whose advantage is not 0; no denominator."""

    def __add__(self, other: Denominators) -> Denominators:
        return Denominators(
            self.actions + other.actions, self.tokens + other.tokens, self.credited + other.credited
        )
