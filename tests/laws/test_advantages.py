"""Laws of every advantage: how much better a response was than what it is compared with."""

from __future__ import annotations

import statistics

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.functional.advantages import at_last_token
from lightning_mpo.objective.advantages import (
    Advantage,
    GeneralizedAdvantage,
    GroupRelative,
    LeaveOneOut,
    PrefixTree,
    ReturnToGo,
)
from lightning_mpo.objective.decoupled import DecoupledRelative
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.objective.preferences import Preferences
from tests.support.builders import right_padded, seeded, subclasses

ADVANTAGES = [
    GroupRelative("std"),
    GroupRelative("none"),
    GroupRelative("batch"),
    LeaveOneOut(),
    DecoupledRelative(),
    Preferences("extremes"),
    Preferences("all"),
]
ids = [f"{type(a).__name__}{list(vars(a).values())}" for a in ADVANTAGES]
each = pytest.mark.parametrize("advantage", ADVANTAGES, ids=ids)
in_groups = [a for a in ADVANTAGES if a.compares_group]
each_in_groups = pytest.mark.parametrize(
    "advantage", in_groups, ids=lambda a: ids[ADVANTAGES.index(a)]
)

P, G = 5, 4
MASK = right_padded([3, 1, 6, 2] * P)
ALL = torch.ones(P * G, dtype=torch.bool)
SOME = torch.rand(P * G, generator=seeded(4)) < 0.7
SOME[:G] = torch.tensor([True, False, False, False])  # a group with one valid row
SOME[G : 2 * G] = False  # and one with none


def rewards(seed: int = 0) -> torch.Tensor:
    return torch.randn(P * G, generator=seeded(seed), dtype=torch.float64)


def estimate(
    advantage: Advantage, rewards_B: torch.Tensor, valid_B: torch.Tensor = ALL
) -> torch.Tensor:
    """Return the advantage of each row, after a look at how it lies on the tokens."""
    advantages_BT = advantage.estimate(
        Outcome(at_last_token(rewards_B, MASK), MASK, G, valid_B)
    ).advantages_BT
    assert not advantages_BT[~MASK].any()
    assert (
        advantages_BT == torch.where(MASK, advantages_BT[:, :1], 0)
    ).all()  # every token of a row the same
    return advantages_BT[:, 0]


def test_the_list_has_every_advantage():
    assert subclasses(Advantage) == {type(a) for a in ADVANTAGES} | {
        GeneralizedAdvantage,
        ReturnToGo,
        PrefixTree,
    }


@each_in_groups
@pytest.mark.parametrize("valid", [ALL, SOME], ids=["all", "some"])
def test_the_advantages_of_a_group_sum_to_zero(advantage, valid):
    values = estimate(advantage, rewards(), valid)
    torch.testing.assert_close(
        values.view(P, G).sum(1), torch.zeros(P).double(), rtol=0, atol=1e-12
    )
    assert values.abs().sum() > 1


@each
def test_a_shift_of_the_rewards_of_a_group_changes_nothing(advantage):
    shift = torch.randn(P, generator=seeded(1)).double().repeat_interleave(G) * 10
    torch.testing.assert_close(
        estimate(advantage, rewards() + shift), estimate(advantage, rewards())
    )


@each
def test_a_larger_reward_means_a_larger_advantage(advantage):
    order = rewards().view(P, G).argsort(1)
    values = estimate(advantage, rewards()).view(P, G).gather(1, order)
    assert (values.diff() >= 0).all()
    if advantage != Preferences("extremes"):  # those in between have no pair
        assert (values.diff() > 0).all()


@each
def test_scaled_rewards_scale_the_advantage_or_leave_it_where_it_is_normalised(advantage):
    """Division by the deviation is invariant up to the 1e-4 in its denominator, the others are linear."""
    of_order = isinstance(advantage, DecoupledRelative | Preferences)
    normalised = of_order or getattr(advantage, "scale", None) == "std"
    once, thrice = estimate(advantage, rewards()), estimate(advantage, 3 * rewards())
    torch.testing.assert_close(
        thrice, once if normalised else 3 * once, rtol=1e-3 if normalised else 1e-12, atol=0
    )


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
            Outcome(
                at_last_token(rewards()[rows], MASK[rows]), MASK[rows], len(rows), ALL[: len(rows)]
            )
        ).advantages_BT[:, 0]
        torch.testing.assert_close(values[rows], alone)


@each
def test_groups_and_rows_may_come_in_any_order(advantage):
    groups = torch.randperm(P, generator=seeded(6))
    rows = torch.cat([p * G + torch.randperm(G, generator=seeded(int(p))) for p in groups])
    torch.testing.assert_close(
        estimate(advantage, rewards()[rows]), estimate(advantage, rewards())[rows]
    )


@each
def test_advantages_carry_no_gradient(advantage):
    rewards_BT = at_last_token(rewards().requires_grad_(), MASK)
    assert not advantage.estimate(Outcome(rewards_BT, MASK, G, ALL)).advantages_BT.requires_grad


def test_against_the_statistics_module():
    groups = rewards().view(P, G).tolist()
    std = [(r - statistics.mean(g)) / (statistics.stdev(g) + 1e-4) for g in groups for r in g]
    none = [r - statistics.mean(g) for g in groups for r in g]
    others = [r - statistics.mean(g[:i] + g[i + 1 :]) for g in groups for i, r in enumerate(g)]
    for advantage, expected in zip(ADVANTAGES, (std, none, none, others, std), strict=False):
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


# --- without a baseline ---------------------------------------------------------------------------------------------


def test_returns_to_go_are_a_loop_over_the_tokens_of_each_row():
    rewards_BT = torch.randn(MASK.shape, generator=seeded(8), dtype=torch.float64) * MASK
    advantage = ReturnToGo(gamma=0.9)
    advantage.check(1)
    estimated = advantage.estimate(Outcome(rewards_BT, MASK, 1, SOME))
    assert estimated.returns_BT is None
    for b, length in enumerate(MASK.sum(1).tolist()):
        ahead = 0.0
        for t in reversed(range(length)):
            ahead = rewards_BT[b, t].item() + 0.9 * ahead
            assert estimated.advantages_BT[b, t].item() == pytest.approx(
                ahead * SOME[b].item(), rel=1e-10
            )
    assert not estimated.advantages_BT[~MASK].any()


def test_who_asks_for_whitening():
    asks = [ReturnToGo(), ReturnToGo(whiten=False), *ADVANTAGES]
    assert [advantage.whiten for advantage in asks] == [
        True,
        False,
        False,
        False,
        True,
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(UserError, match=r"`ReturnToGo.gamma` must be in \[0, 1\], got 1.5"):
        ReturnToGo(gamma=1.5)


# --- with a critic --------------------------------------------------------------------------------------------------


def critic(
    advantage: GeneralizedAdvantage,
    valid_B: torch.Tensor = ALL,
    poison: float = 0.0,
    group_size: int = G,
):
    """Return advantages and returns of rewards on every token, under random values; poison lies on rows not valid."""
    rewards_BT, values_BT = (
        torch.randn(MASK.shape, generator=seeded(s), dtype=torch.float64) for s in (8, 9)
    )
    rewards_BT = torch.where(valid_B[:, None], rewards_BT, poison) * MASK
    estimated = advantage.estimate(Outcome(rewards_BT, MASK, group_size, valid_B, values_BT * MASK))
    return estimated[:2], rewards_BT, values_BT * MASK


def test_generalised_advantages_are_a_loop_over_the_tokens_of_each_row():
    advantage = GeneralizedAdvantage(gamma=0.9, lam=0.8)
    (advantages_BT, returns_BT), rewards_BT, values_BT = critic(advantage)
    for b, length in enumerate(MASK.sum(1).tolist()):
        ahead = after = 0.0
        for t in reversed(range(length)):
            value = values_BT[b, t].item()
            ahead = rewards_BT[b, t].item() + 0.9 * after - value + 0.9 * 0.8 * ahead
            after = value
            assert advantages_BT[b, t].item() == pytest.approx(ahead, rel=1e-10)
            assert returns_BT[b, t].item() == pytest.approx(ahead + value, rel=1e-10)
    assert not advantages_BT[~MASK].any()


def test_values_are_a_baseline_and_no_group_is_needed():
    """λ = γ = 1: reward-to-go minus value, whatever else was answered to the prompt."""
    advantage = GeneralizedAdvantage(lam=1.0)
    assert advantage.needs_values
    assert not advantage.compares_group
    advantage.check(1)
    (advantages_BT, returns_BT), rewards_BT, values_BT = critic(advantage, group_size=1)
    to_go_BT = rewards_BT.flip(1).cumsum(1).flip(1) * MASK
    torch.testing.assert_close(returns_BT, to_go_BT)
    torch.testing.assert_close(advantages_BT, to_go_BT - values_BT)


def test_rows_that_are_not_valid_get_nothing_and_are_their_own_returns():
    advantage = GeneralizedAdvantage()
    (advantages_BT, returns_BT), _, values_BT = critic(advantage, SOME, poison=float("nan"))
    (expected, _), _, _ = critic(advantage)
    assert torch.equal(advantages_BT[SOME], expected[SOME])
    assert not advantages_BT[~SOME].any()
    assert torch.equal(returns_BT[~SOME], values_BT[~SOME])


def test_a_reward_at_the_end_reaches_every_token():
    rewards_BT = at_last_token(rewards(), MASK)
    zero_BT = torch.zeros_like(rewards_BT)
    for lam, reach in ((1.0, 1.0), (0.5, 0.5), (0.0, 0.0)):
        advantages_BT = (
            GeneralizedAdvantage(lam=lam)
            .estimate(Outcome(rewards_BT, MASK, G, ALL, zero_BT))
            .advantages_BT
        )
        row = advantages_BT[2]  # six tokens
        expected = [rewards()[2].item() * reach**k for k in range(5, -1, -1)]
        assert row.tolist() == pytest.approx(expected)


def test_options_out_of_range_are_refused():
    for name in ("gamma", "lam"):
        with pytest.raises(
            UserError, match=rf"`GeneralizedAdvantage.{name}` must be in \[0, 1\], got 1.5"
        ):
            GeneralizedAdvantage(**{name: 1.5})
    with pytest.raises(UserError, match=r"`GeneralizedAdvantage.length` must be at least 1, got 0"):
        GeneralizedAdvantage(length=0)
    with pytest.raises(RuntimeError, match="needs the values of a critic"):
        GeneralizedAdvantage().estimate(Outcome(at_last_token(rewards(), MASK), MASK, G, ALL))
