"""The order of training rows: a pure function of seed, rollout counter, round and curriculum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_mpo.data.curriculum import Curriculum
from lightning_mpo.errors import UserError
from lightning_mpo.functional.curriculum import draw_rows
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptRow


class TrainingOrder:
    """Chooses the training rows of each rollout.

    Args:
        seed: seed of the shuffles and redraws.
        order: "shuffled": anew in each pass over the rows; "file": in the order of the file.
        curriculum: draws the rows of each rollout by weights; None: passes over all rows.

    Raises:
        UserError: a curriculum cannot keep the order of the file.
    """

    def __init__(
        self, seed: int, order: Literal["shuffled", "file"], curriculum: Curriculum | None = None
    ) -> None:
        if curriculum is not None and order == "file":
            raise UserError(
                "`data.order: file` and `data.curriculum` contradict each other: a curriculum "
                "draws rows by their weights; take one of them"
            )
        self.seed, self.order, self.curriculum = seed, order, curriculum
        self._permutation: list[int] = []
        self._permutation_of: tuple[int, int] | None = None

    def indices(
        self, rows: Sequence[PromptRow], counter: int, count: int, round: int = 0
    ) -> list[int]:
        """Return the indices of the rows of one rollout.

        Args:
            rows: all training rows.
            counter: of the rollout.
            count: prompts of a rollout.
            round: 0 goes through the rows in order; a higher round (redrawn prompts) draws at
                random.
        """
        if self.curriculum is not None:
            generator = generator_of(self.seed, Stream.CURRICULUM, counter, round)
            return draw_rows(self.curriculum.weights(rows, counter), count, generator).tolist()
        if round:
            generator = generator_of(self.seed, Stream.REDRAW, counter, round)
            return torch.randint(len(rows), (count,), generator=generator).tolist()
        return [self._index(len(rows), counter * count + i) for i in range(count)]

    def metrics(self, rows: Sequence[PromptRow], counter: int) -> dict[str, float]:
        """Return the metrics of a curriculum.

        `rollout/open_rows` is the effective share of training rows, `(Σw)² / (N·Σw²)` for weights
        w: the share of open rows if all of them have the same weight.
        """
        if self.curriculum is None:
            return {}
        weights_N = self.curriculum.weights(rows, counter)
        share = weights_N.sum().square() / weights_N.square().sum() / len(rows)
        return {"rollout/open_rows": share.item()}

    def learn(self, rows: Sequence[PromptRow], counter: int, counts_RP2: Tensor) -> None:
        """Pass the results of a rollout to the curriculum.

        Args:
            rows: all training rows.
            counter: of the rollout.
            counts_RP2: right and judged completions by round and prompt, over all processes.
        """
        if self.curriculum is None:
            return
        rounds, count, _ = counts_RP2.shape
        drawn = [self.indices(rows, counter, count, round) for round in range(rounds)]
        self.curriculum.learn(rows, torch.tensor(drawn).flatten(), counts_RP2.flatten(0, 1).cpu())

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
