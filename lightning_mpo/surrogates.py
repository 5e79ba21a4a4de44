"""Axis "surrogate": how far the policy may move in one rollout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lightning_mpo.action_spaces import Actions
from lightning_mpo.errors import UserError
from lightning_mpo.functional import surrogates as F


class Surrogate(ABC):
    """A loss per action, to be minimised, unreduced."""

    needs_token_actions: ClassVar[bool] = False
    """True where the loss needs probabilities, not only their ratio; other action spaces are then refused."""

    @abstractmethod
    def loss(self, actions: Actions) -> Tensor:
        """Return `losses_BU`."""

    def clipped(self, actions: Actions) -> Tensor | None:
        """Return where the trust region stops the gradient, bool `[B, U]`; None without a trust region."""
        return None


class ClippedRatio(Surrogate):
    """`-min(R·A, clip(R, 1 - low, 1 + high)·A)`, with an optional dual clip for negative advantages (PPO).

    Args:
        low: lower clip distance, in (0, 1).
        high: upper clip distance, positive; larger than `low` is DAPO's clip-higher.
        dual: cap c > 1 on the ratio where the advantage is negative (verl takes 3 [C]); None: no cap.
    """

    def __init__(self, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> None:
        if not 0 < low < 1:
            raise UserError(f"`ClippedRatio.low` must be in (0, 1), got {low}")
        if high <= 0:
            raise UserError(f"`ClippedRatio.high` must be positive, got {high}")
        if dual is not None and dual <= 1:
            raise UserError(f"`ClippedRatio.dual` must be over 1, got {dual}")
        self.low, self.high, self.dual = low, high, dual

    def loss(self, actions: Actions) -> Tensor:
        return F.clipped_ratio(
            actions.log_ratios_BU, actions.advantages_BU, low=self.low, high=self.high, dual=self.dual
        )

    def clipped(self, actions: Actions) -> Tensor:
        ratio_BU, advantages_BU = F.safe_ratio(actions.log_ratios_BU.detach()), actions.advantages_BU
        above = (ratio_BU > 1 + self.high) & (advantages_BU > 0)
        below = (ratio_BU < 1 - self.low) & (advantages_BU < 0)
        if self.dual is not None:
            below = below | ((ratio_BU > self.dual) & (advantages_BU < 0))
        return (above | below) & actions.mask_BU
