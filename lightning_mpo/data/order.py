"""The order of training rows: a pure function of seed, rollout counter and round."""

from __future__ import annotations

from typing import Literal

import torch

from lightning_mpo.seeding import Stream, generator_of


class TrainingOrder:
    """Chooses the training rows of each rollout.

    Args:
        seed: seed of the shuffles and redraws.
        order: "shuffled": anew in each pass over the rows; "file": in the order of the file.
    """

    def __init__(self, seed: int, order: Literal["shuffled", "file"]) -> None:
        self.seed, self.order = seed, order
        self._permutation: list[int] = []
        self._permutation_of: tuple[int, int] | None = None

    def indices(self, rows: int, counter: int, count: int, round: int = 0) -> list[int]:
        """Return the indices of the rows of one rollout.

        Args:
            rows: number of training rows.
            counter: of the rollout.
            count: prompts of a rollout.
            round: 0 goes through the rows in order; a higher round (redrawn prompts) draws at
                random.
        """
        if round:
            generator = generator_of(self.seed, Stream.REDRAW, counter, round)
            return torch.randint(rows, (count,), generator=generator).tolist()
        return [self._index(rows, counter * count + i) for i in range(count)]

    def _index(self, rows: int, position: int) -> int:
        """Return the row at a position in the sequence of all passes."""
        epoch, offset = divmod(position, rows)
        if self.order == "file":
            return offset
        # the permutation of the current pass is kept
        if self._permutation_of != (epoch, rows):
            generator = generator_of(self.seed, Stream.SHUFFLE, epoch)
            self._permutation = torch.randperm(rows, generator=generator).tolist()
            self._permutation_of = epoch, rows
        return self._permutation[offset]
