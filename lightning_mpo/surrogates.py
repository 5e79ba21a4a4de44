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


class PolicyGradient(Surrogate):
    """`-A·log R`: the plain policy gradient, without weights or a trust region (REINFORCE). Meant for one update a rollout."""

    def loss(self, actions: Actions) -> Tensor:
        return F.policy_gradient(actions.log_ratios_BU, actions.advantages_BU)


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


class ClippedWeight(Surrogate):
    """`-sg(clip(R, 1 - low, 1 + high))·A·log R`: the weight is bounded, and no action loses its gradient (CISPO).

    The gradient is that of the policy gradient with the bounded importance weight. arXiv:2506.13585; related spec 9.5
    [CODE, verl and TRL]; MiniMax-M1 bounds from above only and publishes no value [REC].

    Args:
        low: how far the weight may fall below 1, in (0, 1]; 1 is no bound, as in TRL. verl takes 0.2 [CODE].
        high: how far it may rise above 1, positive; 4 is TRL's recommended cap of 5 [CODE].
    """

    def __init__(self, low: float = 1.0, high: float = 4.0) -> None:
        if not 0 < low <= 1:
            raise UserError(f"`ClippedWeight.low` must be in (0, 1], got {low}")
        if high <= 0:
            raise UserError(f"`ClippedWeight.high` must be positive, got {high}")
        self.low, self.high = low, high

    def loss(self, actions: Actions) -> Tensor:
        now_BU, old_BU = _as_logprobs(actions)
        return F.clipped_weight(now_BU, old_BU, actions.advantages_BU, low=self.low, high=self.high)


class AsymmetricRatio(Surrogate):
    """`-sg(M·w)·A·log R` with w = min(1/R, cap) for good actions and min(R, cap) for bad ones (ASPO).

    Good actions that have become unlikely learn most, and those beyond the trust region nothing: M is PPO's mask.
    arXiv:2510.06062 Eq. 3 [P][C]; core spec 4. On the policy that sampled it is GRPO, so it needs several updates per
    rollout to differ. The released code widens the clip of the 20 % tokens of highest entropy [C]; that is not built.

    Args:
        low: how far the ratio of a bad action may fall below 1, in (0, 1); 0.2 [P].
        high: how far the ratio of a good action may rise above 1, positive; 0.2 [P].
        cap_positive: largest weight of a good action, at least 1; 3 [C], the paper gives no number.
        cap_negative: largest weight of a bad action, at least 1; 3 [C].
    """

    def __init__(
        self, low: float = 0.2, high: float = 0.2, cap_positive: float = 3.0, cap_negative: float = 3.0
    ) -> None:
        if not 0 < low < 1:
            raise UserError(f"`AsymmetricRatio.low` must be in (0, 1), got {low}")
        if high <= 0:
            raise UserError(f"`AsymmetricRatio.high` must be positive, got {high}")
        for name, cap in (("cap_positive", cap_positive), ("cap_negative", cap_negative)):
            if cap < 1:
                raise UserError(f"`AsymmetricRatio.{name}` must be at least 1, got {cap}")
        self.low, self.high = low, high
        self.cap_positive, self.cap_negative = cap_positive, cap_negative

    def loss(self, actions: Actions) -> Tensor:
        now_BU, old_BU = _as_logprobs(actions)
        return F.asymmetric_ratio(
            now_BU,
            old_BU,
            actions.advantages_BU,
            low=self.low,
            high=self.high,
            cap_positive=self.cap_positive,
            cap_negative=self.cap_negative,
        )

    def clipped(self, actions: Actions) -> Tensor:
        ratio_BU, advantages_BU = F.safe_ratio(actions.log_ratios_BU.detach()), actions.advantages_BU
        above = (ratio_BU > 1 + self.high) & (advantages_BU > 0)
        below = (ratio_BU < 1 - self.low) & (advantages_BU < 0)
        return (above | below) & actions.mask_BU


def _as_logprobs(actions: Actions) -> tuple[Tensor, Tensor]:
    """Return log-probs of actions up to a constant, which no gradient knows of: those at rollout weights are set to 0."""
    return actions.log_ratios_BU, actions.log_ratios_BU.new_zeros(actions.log_ratios_BU.shape)
