"""Laws of every advantage: how much better a response was than what it is compared with."""

from __future__ import annotations

import statistics

import pytest
import torch

from lightning_mpo.advantages import Advantage, GroupRelative, LeaveOneOut
from lightning_mpo.errors import UserError
from lightning_mpo.functional.advantages import at_last_token
from tests.helpers import right_padded, seeded, subclasses

ADVANTAGES = [GroupRelative("std"), GroupRelative("none"), LeaveOneOut()]
ids = [f"{type(a).__name__}{list(vars(a).values())}" for a in ADVANTAGES]
each = pytest.mark.parametrize("advantage", ADVANTAGES, ids=ids)
in_groups = [a for a in ADVANTAGES if a.compares_group]
each_in_groups = pytest.mark.parametrize("advantage", in_groups, ids=lambda a: ids[ADVANTAGES.index(a)])

P, G = 5, 4
MASK = right_padded([3, 1, 6, 2] * P)
ALL = torch.ones(P * G, dtype=torch.bool)
SOME = torch.rand(P * G, generator=seeded(4)) < 0.7
SOME[:G] = torch.tensor([True, False, False, False])  # a group with one valid row
SOME[G : 2 * G] = False  # and one with none


def rewards(seed: int = 0) -> torch.Tensor:
    return torch.randn(P * G, generator=seeded(seed), dtype=torch.float64)


def estimate(advantage: Advantage, rewards_B: torch.Tensor, valid_B: torch.Tensor = ALL) -> torch.Tensor:
    """Return the advantage of each row, after a look at how it lies on the tokens."""
    advantages_BT = advantage.estimate(at_last_token(rewards_B, MASK), MASK, G, valid_B).advantages_BT
    assert not advantages_BT[~MASK].any()
    assert (advantages_BT == torch.where(MASK, advantages_BT[:, :1], 0)).all()  # every token of a row the same
    return advantages_BT[:, 0]


def test_the_list_has_every_advantage():
    assert subclasses(Advantage) == {type(a) for a in ADVANTAGES}


@each_in_groups
@pytest.mark.parametrize("valid", [ALL, SOME], ids=["all", "some"])
def test_the_advantages_of_a_group_sum_to_zero(advantage, valid):
    values = estimate(advantage, rewards(), valid)
    torch.testing.assert_close(values.view(P, G).sum(1), torch.zeros(P).double(), rtol=0, atol=1e-12)
    assert values.abs().sum() > 1


@each
def test_a_shift_of_the_rewards_of_a_group_changes_nothing(advantage):
    shift = torch.randn(P, generator=seeded(1)).double().repeat_interleave(G) * 10
    torch.testing.assert_close(estimate(advantage, rewards() + shift), estimate(advantage, rewards()))


@each
def test_a_larger_reward_means_a_larger_advantage(advantage):
    order = rewards().view(P, G).argsort(1)
    assert torch.equal(estimate(advantage, rewards()).view(P, G).argsort(1), order)


@each
def test_scaled_rewards_scale_the_advantage_or_leave_it_where_it_is_normalised(advantage):
    """`GroupRelative("std")` is invariant up to the 1e-4 in its denominator, the others are linear."""
    normalised = getattr(advantage, "scale", None) == "std"
    once, thrice = estimate(advantage, rewards()), estimate(advantage, 3 * rewards())
    torch.testing.assert_close(thrice, once if normalised else 3 * once, rtol=1e-3 if normalised else 1e-12, atol=0)


@each
def test_equal_rewards_give_exactly_nothing(advantage):
    assert not estimate(advantage, torch.full((P * G,), 0.1).double()).any()


@each
def test_rows_that_are_not_valid_get_nothing_and_influence_nobody(advantage):
    values = estimate(advantage, rewards(), SOME)
    assert not values[~SOME].any()
    garbage = torch.where(SOME, rewards(), torch.tensor(float("nan")).double())
    assert torch.equal(estimate(advantage, garbage, SOME), values)
    for p in range(P):  # a group is what its valid rows alone would be
        rows = [p * G + g for g in range(G) if SOME[p * G + g]]
        if len(rows) < 2:
            assert not values[p * G : (p + 1) * G].any()
            continue
        alone = advantage.estimate(
            at_last_token(rewards()[rows], MASK[rows]), MASK[rows], len(rows), ALL[: len(rows)]
        ).advantages_BT[:, 0]
        torch.testing.assert_close(values[rows], alone)


@each
def test_groups_and_rows_may_come_in_any_order(advantage):
    groups = torch.randperm(P, generator=seeded(6))
    rows = torch.cat([p * G + torch.randperm(G, generator=seeded(int(p))) for p in groups])
    torch.testing.assert_close(estimate(advantage, rewards()[rows]), estimate(advantage, rewards())[rows])


@each
def test_advantages_carry_no_gradient(advantage):
    rewards_BT = at_last_token(rewards().requires_grad_(), MASK)
    assert not advantage.estimate(rewards_BT, MASK, G, ALL).advantages_BT.requires_grad


def test_against_the_statistics_module():
    groups = rewards().view(P, G).tolist()
    std = [(r - statistics.mean(g)) / (statistics.stdev(g) + 1e-4) for g in groups for r in g]
    none = [r - statistics.mean(g) for g in groups for r in g]
    others = [r - statistics.mean(g[:i] + g[i + 1 :]) for g in groups for i, r in enumerate(g)]
    for advantage, expected in zip(ADVANTAGES, (std, none, others), strict=True):
        torch.testing.assert_close(estimate(advantage, rewards()), torch.tensor(expected).double())


@each
def test_a_group_of_one_is_refused_where_groups_are_compared(advantage):
    advantage.check(2)
    if advantage.compares_group:
        message = (
            f"`{type(advantage).__name__}` compares the completions of a prompt; "
            "`rollout.completions` must be at least 2, got 1"
        )
        with pytest.raises(UserError, match=message):
            advantage.check(1)
    else:
        advantage.check(1)
