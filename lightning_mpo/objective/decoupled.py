"""An advantage that compares each reward of a response by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_mpo.errors import UserError
from lightning_mpo.functional.decoupled import decoupled_relative
from lightning_mpo.objective.advantages import Advantage
from lightning_mpo.objective.axes import Axes
from lightning_mpo.objective.outcome import Estimate, Outcome
from lightning_mpo.objective.terms import LossTerm


@dataclass(frozen=True)
class DecoupledRelative(Advantage):
    """Each reward is normalised within the group, then they are summed and whitened (GDPO).

        A_i = Σ_k w_k (r_ik - mean_k) / (std_k + 1e-4)     ([C, TRL and verl]; docs/algorithms.md 4.9)

    Two responses with the same sum of other rewards thus differ, and no reward outweighs the others
    by its scale. A reward that abstains adds 0. With one reward it is `GroupRelative`, whitened.

    Args:
        whiten: give the advantages of all response tokens of a rollout, over all ranks, mean 0 and
            standard deviation 1, so that the step does not grow with the number of rewards.
    """

    compares_group = True

    whiten: bool = True

    def estimate(self, outcome: Outcome) -> Estimate:
        rewards_BR, weights_R = outcome.parts_BR, outcome.weights_R
        if rewards_BR is None or weights_R is None:  # one reward
            rewards_BR = outcome.rewards_B[:, None]
            weights_R = torch.ones_like(rewards_BR[0])
        advantages_B = decoupled_relative(
            rewards_BR, weights_R, outcome.group_size, valid_B=outcome.valid_B
        )
        return Estimate(outcome.spread(advantages_B))

    def check_with(self, axes: Axes) -> None:
        super().check_with(axes)
        if any(term.in_reward for term in axes.all(LossTerm)):
            raise UserError(
                "`DecoupledRelative` compares each reward by itself, without the KL penalty that "
                "is subtracted from their sum; use `KLPenalty.place: loss`"
            )
