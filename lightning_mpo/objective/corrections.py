"""Axis "correction": weights for a sampler whose log-probs differ from the trainer's at the same
weights.

Equations and sources: docs/algorithms.md 9.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_mpo.checks import not_below, one_of, positive
from lightning_mpo.errors import UserError
from lightning_mpo.functional import corrections as F
from lightning_mpo.objective.action_spaces import ActionSpace
from lightning_mpo.objective.axes import Axes, Member
from lightning_mpo.objective.surrogates import Surrogate


class Correction(Member):
    """Weighs the surrogate's loss of each token, once per rollout. Denominators do not change."""

    level: Literal["token", "sequence"]
    """"token" weighs each token by its own ratio, "sequence" all tokens of a response by their
    product.
    """

    def __post_init__(self) -> None:
        one_of(type(self).__name__, ("token", "sequence"), level=self.level)

    def check_with(self, axes: Axes) -> None:
        surrogate, actions = axes[Surrogate], axes[ActionSpace]
        if surrogate.at_behaviour:
            raise UserError(
                f"`{type(surrogate).__name__}` takes its ratios against the sampler's own "
                "log-probs, so that a "
                "`correction` would count the difference twice; set `correction: null`"
            )
        if self.level == "token" and not actions.token_level:
            raise UserError(
                f"`{type(self).__name__}.level: token` has no meaning over "
                f"`{type(actions).__name__}`; use "
                "`level: sequence`"
            )

    def weights(
        self, old_logprobs_BT: Tensor, behaviour_logprobs_BT: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """Return the weight of each token, float `[B, T]`, without gradient.

        Args:
            old_logprobs_BT: of the trainer at rollout weights, in nats.
            behaviour_logprobs_BT: as recorded by the sampler.
            mask_BT: tokens that were sampled.
        """
        sequence = self.level == "sequence"
        return self.bound(
            F.sampler_weights(old_logprobs_BT, behaviour_logprobs_BT, mask_BT, sequence=sequence)
        )

    @abstractmethod
    def bound(self, weights_BT: Tensor) -> Tensor:
        """Return the weights that are used."""


@dataclass(frozen=True)
class TruncatedWeights(Correction):
    """`min(w, cap)`, w = π_old / μ: truncated importance sampling (TIS).

    Args:
        level: "token" or "sequence".
        cap: largest weight, above 0; 2 is a common choice [REC], 3 is TRL's cap for its sequence
            mask [C].
    """

    level: Literal["token", "sequence"] = "token"
    cap: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("TruncatedWeights", cap=self.cap)

    def bound(self, weights_BT: Tensor) -> Tensor:
        return F.truncated(weights_BT, cap=self.cap)


@dataclass(frozen=True)
class MaskedWeights(Correction):
    """`w` where `low <= w <= cap`, else 0, w = π_old / μ: tokens on which the two disagree too much
    have no loss.

    Args:
        level: "token" or "sequence"; "sequence" with a cap of 3 is TRL's default [C]
            (docs/algorithms.md 9).
        cap: largest weight that is kept.
        low: smallest weight that is kept, in [0, cap).
    """

    level: Literal["token", "sequence"] = "sequence"
    cap: float = 3.0
    low: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("MaskedWeights", cap=self.cap)
        not_below("MaskedWeights", 0, low=self.low)
        if not self.low < self.cap:
            raise UserError(
                f"`MaskedWeights.low` must be in [0, cap), got {self.low} and a cap of {self.cap}"
            )

    def bound(self, weights_BT: Tensor) -> Tensor:
        return F.masked(weights_BT, low=self.low, cap=self.cap)
