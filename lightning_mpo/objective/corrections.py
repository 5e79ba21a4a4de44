"""Axis "correction": what if the sampler's log-probs differ from the trainer's at the same weights?

Equations and sources: docs/algorithms.md 9.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from lightning_mpo.checks import not_below, one_of, positive
from lightning_mpo.errors import UserError
from lightning_mpo.functional import corrections as F


class Correction(ABC):
    """Weighs what each token contributes to the surrogate, once per rollout. Denominators do not change.

    Args:
        level: "token" weighs each token by its own ratio, "sequence" all tokens of a response by their product.
    """

    def __init__(self, level: Literal["token", "sequence"]) -> None:
        one_of(type(self).__name__, ("token", "sequence"), level=level)
        self.level = level

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


class TruncatedWeights(Correction):
    """`min(w, cap)`, w = π_old / μ: truncated importance sampling (TIS).

    Args:
        level: "token" or "sequence".
        cap: largest weight, above 0; 2 is a common choice [REC], 3 is TRL's cap for its sequence mask [C].
    """

    def __init__(self, level: Literal["token", "sequence"] = "token", cap: float = 2.0) -> None:
        super().__init__(level)
        positive("TruncatedWeights", cap=cap)
        self.cap = cap

    def bound(self, weights_BT: Tensor) -> Tensor:
        return F.truncated(weights_BT, cap=self.cap)


class MaskedWeights(Correction):
    """`w` where `low <= w <= cap`, else 0, w = π_old / μ: what the two disagree on too much is not learnt from.

    Args:
        level: "token" or "sequence"; "sequence" with a cap of 3 is TRL's default [C] (docs/algorithms.md 9).
        cap: largest weight that is kept.
        low: smallest weight that is kept, in [0, cap).
    """

    def __init__(
        self, level: Literal["token", "sequence"] = "sequence", cap: float = 3.0, low: float = 0.0
    ) -> None:
        super().__init__(level)
        positive("MaskedWeights", cap=cap)
        not_below("MaskedWeights", 0, low=low)
        if not low < cap:
            raise UserError(
                f"`MaskedWeights.low` must be in [0, cap), got {low} and a cap of {cap}"
            )
        self.cap, self.low = cap, low

    def bound(self, weights_BT: Tensor) -> Tensor:
        return F.masked(weights_BT, low=self.low, cap=self.cap)
