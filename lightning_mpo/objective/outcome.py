"""The judged responses that an advantage receives, and the estimate that it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """The advantages of a rollout, and quantities that some estimators add."""

    advantages_BT: Tensor
    returns_BT: Tensor | None = None  # targets of a critic
    weights_BT: Tensor | None = None  # of tokens in the loss, 0: left out; None: all alike


@dataclass(frozen=True)
class Outcome:
    """The judged responses of a rollout, as an advantage sees them.

    Args:
        rewards_BT: reward per token. A response's reward stands at its last token; a `TokenReward`
            has a reward at each token.
        mask_BT: response tokens.
        group_size: G; the rows of a prompt are neighbours.
        valid_B: rows whose reward counts.
        values_BT: of a critic, where `needs_values`.
        tokens_BT: response ids.
        sums_B: exact reward of each response. None: sum `rewards_BT`. Rounding in these sums could
            make equal rewards differ.
        parts_BR: each reward by itself, unweighted, nan where it did not judge; None: not known.
        weights_R: weights of these rewards.
    """

    rewards_BT: Tensor
    mask_BT: Tensor
    group_size: int
    valid_B: Tensor
    values_BT: Tensor | None = None
    tokens_BT: Tensor | None = None
    sums_B: Tensor | None = None
    parts_BR: Tensor | None = None
    weights_R: Tensor | None = None

    @property
    def rewards_B(self) -> Tensor:
        """Reward of each response."""
        return self.rewards_BT.sum(1) if self.sums_B is None else self.sums_B

    @property
    def valid_BT(self) -> Tensor:
        """Response tokens of valid rows."""
        return self.mask_BT & self.valid_B[:, None]

    def spread(self, values_B: Tensor) -> Tensor:
        """Give each token of a response the value of the response."""
        return values_B[:, None].expand(self.mask_BT.shape) * self.mask_BT
