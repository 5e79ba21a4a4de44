"""Counts of right completions of each prompt of a rollout, for a curriculum."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mpo.rewards.scoring import Scores
from lightning_mpo.rollout.ranks import Total


class Successes:
    """Adds up right and judged completions by round and place of their prompt.

    Args:
        prompts: prompts of a rollout over all ranks.
        first: place of the first prompt of this rank.
        completions: G.
    """

    def __init__(self, prompts: int, first: int, completions: int) -> None:
        self.prompts, self.first, self.completions = prompts, first, completions
        self._rounds: dict[int, Tensor] = {}

    def add(self, round: int, scores: Scores) -> None:
        """Count the rows of a round, group after group."""
        rows_B2 = torch.stack([scores.correct_B & scores.decided_B, scores.decided_B], 1).cpu()
        groups_P2 = rows_B2.view(-1, self.completions, 2).sum(1)
        counts_P2 = torch.zeros(self.prompts, 2, dtype=torch.float64)
        counts_P2[self.first : self.first + len(groups_P2)] = groups_P2.double()
        self._rounds[round] = counts_P2

    def total(self, rounds: int, total: Total) -> Tensor:
        """Return the counts over all ranks: float64, shape `[rounds, P, 2]`.

        Args:
            rounds: number of rounds, the same on all ranks.
            total: sums over ranks; all of them call it.
        """
        none_P2 = torch.zeros(self.prompts, 2, dtype=torch.float64)
        return total(torch.stack([self._rounds.get(round, none_P2) for round in range(rounds)]))
