"""The processes that share a rollout."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks; all of them call it."""


class Ranks:
    """One process; a subclass speaks of several."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' values; all of them call it together."""
        return values
