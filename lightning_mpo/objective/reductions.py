"""Axis "reduction": what is averaged over what (docs/algorithms.md 7).

A reduction is written as `sum(coefficients · losses) / denominator`. The coefficients depend on one
row only and the denominator adds up over rows, so that any split into micro-batches or over ranks
gives the same gradient once the denominator of the whole mini-batch is known. Denominators are made
of the same weights as the losses, or of those of whole responses where a selection asks for means
that are unbiased (`mean_weights_BU`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_mpo.checks import at_least
from lightning_mpo.objective.axes import Member


class Reduction(Member):
    """Averages losses with the denominator of the whole mini-batch. Rows without weight count
    nowhere.
    """

    @abstractmethod
    def coefficients(self, weights_BU: Tensor, mean_weights_BU: Tensor | None = None) -> Tensor:
        """Return what each loss is multiplied with. Shape `[B, U]`.

        Args:
            weights_BU: of the losses.
            mean_weights_BU: weights that a row's mean is taken over; None: the same.
        """

    @abstractmethod
    def denominator(self, mean_weights_BU: Tensor) -> Tensor:
        """Return these rows' part of the denominator, a scalar that adds up over rows and ranks."""


@dataclass(frozen=True)
class TokenMean(Reduction):
    """`sum(w·loss) / sum(w)`: every token counts alike (DAPO)."""

    def coefficients(self, weights_BU: Tensor, mean_weights_BU: Tensor | None = None) -> Tensor:
        return weights_BU

    def denominator(self, mean_weights_BU: Tensor) -> Tensor:
        return mean_weights_BU.sum()


@dataclass(frozen=True)
class SequenceMean(Reduction):
    """The mean over non-empty rows of their `sum(w·loss) / sum(w)`: every response counts alike
    (GRPO, GSPO).
    """

    def coefficients(self, weights_BU: Tensor, mean_weights_BU: Tensor | None = None) -> Tensor:
        mean_weights_BU = weights_BU if mean_weights_BU is None else mean_weights_BU
        return weights_BU / mean_weights_BU.sum(1, keepdim=True).clamp(min=1e-8)

    def denominator(self, mean_weights_BU: Tensor) -> Tensor:
        return (mean_weights_BU.sum(1) > 0).sum().to(mean_weights_BU.dtype)


@dataclass(frozen=True)
class ConstantLength(Reduction):
    """`sum(w·loss) / (rows · length)`: no response is scaled by its own length (Dr. GRPO).

    Args:
        length: tokens, usually `rollout.max_new_tokens`.
    """

    length: int

    def __post_init__(self) -> None:
        at_least("ConstantLength", 1, length=self.length)

    def coefficients(self, weights_BU: Tensor, mean_weights_BU: Tensor | None = None) -> Tensor:
        return weights_BU

    def denominator(self, mean_weights_BU: Tensor) -> Tensor:
        return (mean_weights_BU.sum(1) > 0).sum().to(mean_weights_BU.dtype) * self.length
