"""The weights of a block's token log-ratios in `BlockActions` (docs/algorithms.md 3.3)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from lightning_mpo.checks import not_below, within
from lightning_mpo.errors import UserError
from lightning_mpo.functional import block_weights as F
from lightning_mpo.objective.axes import Member


class BlockWeights(Member):
    """The weights beta_0 … beta_{N-1} of a block's token log-ratios; they sum to 1."""

    @abstractmethod
    def weights(self, length: int) -> list[float]:
        """Return one weight per offset."""


@dataclass(frozen=True)
class FutureShare(BlockWeights):
    """`beta_0 = 1 - share`, the other offsets share the rest evenly: MPO-10 … MPO-40 [S, I]
    (docs/algorithms.md 3.3).

    Args:
        share: weight of the future tokens, probability in [0, 1); 0.2 by default [I].
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        within("FutureShare", "[0, 1)", share=self.share)

    def weights(self, length: int) -> list[float]:
        return F.block_weights(length, self.share).tolist()


@dataclass(frozen=True)
class GeometricDecay(BlockWeights):
    """`beta_n ∝ decay^n`, closest to the log-COP-TD discount that inspired the paper [I]
    (docs/algorithms.md 3.3).

    Args:
        decay: factor from one offset to the next, in (0, 1]; 1 gives uniform weights.
    """

    decay: float = 0.5

    def __post_init__(self) -> None:
        within("GeometricDecay", "(0, 1]", decay=self.decay)

    def weights(self, length: int) -> list[float]:
        return F.geometric_weights(length, self.decay).tolist()


@dataclass(frozen=True)
class ExplicitWeights(BlockWeights):
    """The weights as given, not normalised: all ones give the exact product of the ratios (MPO Eq.
    11 [S]).

    Args:
        values: one weight per offset.
    """

    values: list[float]

    def __post_init__(self) -> None:
        for value in self.values:
            not_below("ExplicitWeights", 0, values=value)
        if not any(self.values):
            raise UserError(
                f"`ExplicitWeights.values` must be non-negative and not all 0, got {self.values}"
            )

    def weights(self, length: int) -> list[float]:
        if len(self.values) != length:
            raise UserError(
                f"`ExplicitWeights.values` must have one weight per offset ({length}), got "
                f"{len(self.values)}"
            )
        return list(self.values)
