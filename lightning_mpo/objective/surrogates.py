"""Axis "surrogate": how far the policy may move in one rollout (docs/algorithms.md 5)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mpo.checks import above, not_below, positive, within
from lightning_mpo.errors import UserError
from lightning_mpo.functional import surrogates as F
from lightning_mpo.functional.selections import highest
from lightning_mpo.functional.trust_regions import (
    outside_clip,
)
from lightning_mpo.objective.action_spaces import Actions, ActionSpace
from lightning_mpo.objective.axes import Axes, Member
from lightning_mpo.objective.selection import AllTokens, Selection
from lightning_mpo.scores import Metrics


class Surrogate(Member):
    """A loss per action, to be minimised, unreduced."""

    at_behaviour = False
    """True if ratios are against the sampler's log-probs, and not against those that the trainer
    recomputes.
    """

    at_reference = False
    """True if log-ratios are against the reference, which then scores each rollout."""

    compares_group = False
    """True if the loss of a response depends on the other responses to its prompt. Micro-batches
    then hold whole groups.
    """

    on_policy = False
    """True if the loss is meant for the weights that sampled, so that a second update on a rollout
    is biased.
    """

    @property
    def needs_token_actions(self) -> bool:
        """Whether the loss needs `TokenTerms`, which only single tokens have; other actions are
        then refused.
        """
        return False

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss needs the entropies at rollout weights."""
        return False

    @property
    def candidates(self) -> int:
        """K, the most probable ids whose log-probs the sampler must record; 0: none."""
        return 0

    def bound(self, log_ratios: Tensor, advantages_BT: Tensor) -> Tensor:
        """Bound the log-ratios of tokens before they are grouped into actions; most surrogates
        bound actions only.
        """
        return log_ratios

    @abstractmethod
    def loss(self, actions: Actions) -> Tensor:
        """Return `losses_BU`."""

    def clipped(self, actions: Actions) -> Tensor | None:
        """Return where the trust region stops the gradient, bool `[B, U]`; None without a trust
        region.
        """
        return None

    def measure(self, actions: Actions) -> Metrics:
        """Return metrics of this surrogate alone, as sums that add up."""
        return {}

    def check(self, vocabulary: int) -> None:
        """Refuse options that the vocabulary cannot hold; called before a model is loaded."""

    def check_with(self, axes: Axes) -> None:
        actions = axes[ActionSpace]
        if self.needs_token_actions and not actions.token_level:
            raise UserError(
                f"`{type(self).__name__}` needs probabilities of single tokens and has no meaning "
                "over "
                f"`{type(actions).__name__}`; use `actions: TokenActions`"
            )


@dataclass(frozen=True)
class PolicyGradient(Surrogate):
    """`-A·log R`: the plain policy gradient, without weights or a trust region (REINFORCE). Meant
    for one update a rollout.
    """

    on_policy = True

    def loss(self, actions: Actions) -> Tensor:
        return F.policy_gradient(actions.log_ratios_BU, actions.advantages_BU)


@dataclass(frozen=True)
class ClippedRatio(Surrogate):
    """`-min(R·A, clip(R, 1 - low, 1 + high)·A)`, with an optional dual clip for negative advantages
    (PPO).

    The form of PPO, GRPO, DAPO and MPO: docs/algorithms.md 5.2.

    Args:
        low: lower clip distance, in [0, 1).
        high: upper clip distance, not negative; larger than `low` is DAPO's clip-higher.
        dual: cap c > 1 on the ratio where the advantage is negative (verl takes 3 [C]); None: no
            cap.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def __post_init__(self) -> None:
        within("ClippedRatio", "[0, 1)", low=self.low)
        not_below("ClippedRatio", 0, high=self.high)
        above("ClippedRatio", 1, dual=self.dual)

    def loss(self, actions: Actions) -> Tensor:
        return F.clipped_ratio(
            actions.log_ratios_BU,
            actions.advantages_BU,
            low=self.low,
            high=self.high,
            dual=self.dual,
        )

    def clipped(self, actions: Actions) -> Tensor:
        return _outside_clip(actions, self.low, self.high, self.dual)


@dataclass(frozen=True)
class ClippedWeight(Surrogate):
    """`-sg(clip(R, 1 - low, 1 + high))·A·log R`: the weight is bounded, and no action loses its
    gradient (CISPO).

    The gradient is that of the policy gradient with the bounded importance weight. arXiv:2506.13585
    [C, verl and TRL]; docs/algorithms.md 5.3. MiniMax-M1 bounds from above only and publishes no
    value [REC].

    Args:
        low: how far the weight may fall below 1, in (0, 1]; 1 is no bound, as in TRL. verl takes
            0.2 [C].
        high: how far it may rise above 1, positive; 4 is TRL's recommended cap of 5 [C].
    """

    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        within("ClippedWeight", "(0, 1]", low=self.low)
        positive("ClippedWeight", high=self.high)

    def loss(self, actions: Actions) -> Tensor:
        now_BU, old_BU = _as_logprobs(actions)
        return F.clipped_weight(now_BU, old_BU, actions.advantages_BU, low=self.low, high=self.high)


@dataclass(frozen=True)
class AsymmetricRatio(Surrogate):
    """`-sg(M·w)·A·log R` with w = min(1/R, cap) for good actions and min(R, cap) for bad ones
    (ASPO).

    Good actions that have become unlikely learn most, and those beyond the trust region nothing: M
    is PPO's mask. arXiv:2510.06062 Eq. 3 [P, C]; docs/algorithms.md 5.4. On the policy that sampled
    it is GRPO, so it needs several updates per rollout to differ.

    Args:
        low: how far the ratio of a bad action may fall below 1, in (0, 1); 0.2 [P].
        high: how far the ratio of a good action may rise above 1, positive; 0.2 [P].
        cap_positive: largest weight of a good action, at least 1; 3 [C], the paper gives no number.
        cap_negative: largest weight of a bad action, at least 1; 3 [C].
        wide: both distances for the fifth of a response's tokens that had the highest entropy at
            rollout weights, in (0, 1); 0.4 in the released code [C]. None: one clip for all, as in
            the paper [P].
    """

    low: float = 0.2
    high: float = 0.2
    cap_positive: float = 3.0
    cap_negative: float = 3.0
    wide: float | None = None

    def __post_init__(self) -> None:
        within("AsymmetricRatio", "(0, 1)", low=self.low, wide=self.wide)
        positive("AsymmetricRatio", high=self.high)
        not_below("AsymmetricRatio", 1, cap_positive=self.cap_positive)
        not_below("AsymmetricRatio", 1, cap_negative=self.cap_negative)

    def check_with(self, axes: Axes) -> None:
        super().check_with(axes)
        if self.wide is not None and not isinstance(axes[Selection], AllTokens):
            raise UserError(
                "`AsymmetricRatio.wide` is for the most uncertain tokens of whole responses; use "
                "`selection: "
                f"AllTokens`, not `{type(axes[Selection]).__name__}`, or `wide: null`"
            )

    @property
    def needs_token_actions(self) -> bool:
        """Whether entropies of tokens decide the clip."""
        return self.wide is not None

    @property
    def needs_entropy(self) -> bool:
        """Whether entropies of tokens decide the clip."""
        return self.wide is not None

    def _clip(self, actions: Actions) -> tuple[float | Tensor, float | Tensor]:
        if self.wide is None:
            return self.low, self.high
        if actions.tokens is None or actions.tokens.old_entropy_BT is None:
            raise RuntimeError("`AsymmetricRatio.wide` needs the entropies at rollout weights")
        uncertain_BT = highest(actions.tokens.old_entropy_BT, actions.mask_BU, share=0.2)
        low_BT = torch.where(uncertain_BT, self.wide, self.low)
        high_BT = torch.where(uncertain_BT, self.wide, self.high)
        return low_BT, high_BT

    def loss(self, actions: Actions) -> Tensor:
        now_BU, old_BU = _as_logprobs(actions)
        low, high = self._clip(actions)
        return F.asymmetric_ratio(
            now_BU,
            old_BU,
            actions.advantages_BU,
            low=low,
            high=high,
            cap_positive=self.cap_positive,
            cap_negative=self.cap_negative,
        )

    def clipped(self, actions: Actions) -> Tensor:
        return _outside_clip(actions, *self._clip(actions))


@dataclass(frozen=True)
class BoundedTokens(Surrogate):
    """`-R·A` over log-ratios of tokens that were bounded where the objective would grow, before
    they were grouped (GMPO).

        ell'_t = min(ell_t, high) if A > 0,  max(ell_t, -low) if A < 0;   log R = mean_t ell'_t

    With `SequenceActions(mean=True)` it is GMPO, the geometric mean of clipped ratios
    (arXiv:2507.20673 [P, abstract]; form and clip as in verl [C]; docs/algorithms.md 5.5); other
    action spaces are a generalisation of ours [I].

    Args:
        low: bound from below, nats, positive; 0.4 is the paper's [REC].
        high: bound from above, nats, positive; 0.4.
    """

    low: float = 0.4
    high: float = 0.4

    def __post_init__(self) -> None:
        positive("BoundedTokens", low=self.low, high=self.high)

    def bound(self, log_ratios: Tensor, advantages_BT: Tensor) -> Tensor:
        advantages = (
            advantages_BT
            if log_ratios.ndim == 2
            else advantages_BT[..., None].expand_as(log_ratios)
        )
        return F.bounded_log_ratios(log_ratios, advantages, low=self.low, high=self.high)

    def loss(self, actions: Actions) -> Tensor:
        return -F.safe_ratio(actions.log_ratios_BU) * actions.advantages_BU


def _outside_clip(
    actions: Actions, low: float | Tensor, high: float | Tensor, dual: float | None = None
) -> Tensor:
    """Return the actions whose ratio has left the clip range, so that they have no gradient."""
    ratios_BU = F.safe_ratio(actions.log_ratios_BU.detach())
    stopped_BU = outside_clip(ratios_BU, actions.advantages_BU, low=low, high=high, dual=dual)
    return stopped_BU & actions.mask_BU


def _as_logprobs(actions: Actions) -> tuple[Tensor, Tensor]:
    """Return log-probs of actions up to a constant without gradient: those at rollout weights are
    set to 0.
    """
    return actions.log_ratios_BU, actions.log_ratios_BU.new_zeros(actions.log_ratios_BU.shape)
