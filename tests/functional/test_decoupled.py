"""Several rewards, each normalised within its group: against loops, and beside `GroupRelative`."""

from __future__ import annotations

import statistics

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.functional.advantages import at_last_token
from lightning_mpo.functional.decoupled import decoupled_relative
from lightning_mpo.objective.decoupled import DecoupledRelative
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.rewards import Completion, score_all
from lightning_mpo.rewards.resolving import as_rewards
from tests.support.builders import seeded

P, G, R = 4, 5, 3
WEIGHTS = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def draws() -> tuple[torch.Tensor, torch.Tensor]:
    """Return rewards of very different scales, some of them nan, and the valid rows."""
    rewards = torch.randn(P * G, R, generator=seeded(0), dtype=torch.float64)
    rewards = rewards * torch.tensor([1.0, 1000.0, 0.01])
    rewards[torch.rand(P * G, R, generator=seeded(1)) < 0.2] = torch.nan
    return rewards, torch.rand(P * G, generator=seeded(2)) < 0.8


def test_against_a_loop_over_groups_and_rewards() -> None:
    rewards, valid = draws()
    expected = [0.0] * (P * G)
    for p in range(P):
        for r in range(R):
            rows = [
                b for b in range(p * G, p * G + G) if valid[b] and rewards[b, r] == rewards[b, r]
            ]
            values = [rewards[b, r].item() for b in rows]
            for b in rows if len(rows) > 1 else ():
                centred = rewards[b, r].item() - statistics.mean(values)
                expected[b] += WEIGHTS[r].item() * centred / (statistics.stdev(values) + 1e-4)
    actual = decoupled_relative(rewards, WEIGHTS, G, valid_B=valid)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_equal_sums_of_different_rewards_differ() -> None:
    """The point of GDPO: (0, 3), (1, 2) and (2, 1) have the same sum."""
    rewards = torch.tensor([[0.0, 3.0], [1.0, 2.0], [2.0, 1.0], [0.0, 0.0]])
    advantages = decoupled_relative(rewards, torch.tensor([1.0, 1.0]), 4)
    assert len({round(value, 3) for value in advantages[:3].tolist()}) == 3


def test_the_scale_of_a_reward_does_not_matter_and_its_weight_does() -> None:
    rewards, valid = draws()
    scaled = rewards * torch.tensor([1.0, 1.0, 1e6])
    torch.testing.assert_close(
        decoupled_relative(scaled, WEIGHTS, G, valid_B=valid),
        decoupled_relative(rewards * 1e6, WEIGHTS, G, valid_B=valid),
        rtol=1e-3,
        atol=1e-3,
    )
    none = torch.zeros(R, dtype=torch.float64)
    assert not decoupled_relative(rewards, none, G, valid_B=valid).any()


def test_the_rewards_of_a_run_reach_the_advantage() -> None:
    """Names, weights and abstentions of `score_all`, by way of the experience of a rollout."""
    from lightning_mpo.rollout.experience import _with_parts

    def large(completions):
        return [100.0, 0.0, None, 300.0]

    def small(completions):
        return [0.0, 0.1, 0.2, 0.0]

    rewards = as_rewards([large, small])
    rewards[1].weight = 0.5
    scores = score_all(rewards, [Completion("p", "t", "x", 1, True, {})] * 4)
    mask = torch.ones(4, 2, dtype=torch.bool)
    rewards_BT = at_last_token(scores.rewards_B, mask)
    outcome = _with_parts(Outcome(rewards_BT, mask, 4, scores.valid_B), scores, scores.rewards_B)
    estimate = DecoupledRelative(whiten=False).estimate(outcome).advantages_BT
    parts = torch.stack(list(scores.by_reward.values()), 1)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    expected = decoupled_relative(parts, weights, 4)
    torch.testing.assert_close(estimate, expected[:, None].expand(4, 2))
    assert outcome.parts_BR.isnan().tolist() == [[False, False]] * 2 + [
        [True, False],
        [False, False],
    ]


def test_a_penalty_within_the_reward_is_refused() -> None:
    kl = KLPenalty(ConstantCoefficient(0.1), estimator="k1", place="reward")
    with pytest.raises(UserError, match="`DecoupledRelative` compares each reward by itself"):
        Objective(advantage=DecoupledRelative(), terms=[kl])
    assert DecoupledRelative().whiten
