"""Support shift: its identities, against sets, and an interval against its definition."""

import itertools
import math

import pytest
import torch

from lightning_mpo.functional.evaluation import pass_at_k
from lightning_mpo.functional.support_shift import (
    expansion_ratio,
    expansion_ratio_interval,
    ratio_gap,
    shift,
    solved,
)

P, G = 40, 6


def scores(seed: int) -> torch.Tensor:
    return torch.rand(P, G, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, G])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9, 2.0])
def test_the_parts_are_those_of_sets_and_add_up(k, threshold):
    base, trained = scores(0), scores(1)
    sets = [{p for p in range(P) if max(x[p, :k].tolist()) >= threshold} for x in (base, trained)]
    parts = shift(*(solved(x, threshold, k) for x in (base, trained)))
    counts = {name: int(part.sum()) for name, part in parts.items()}
    assert counts == {
        "preserved": len(sets[0] & sets[1]),
        "expansion": len(sets[1] - sets[0]),
        "shrinkage": len(sets[0] - sets[1]),
        "out_of_support": P - len(sets[0] | sets[1]),
    }
    assert torch.equal(sum(parts.values()), torch.ones(P, dtype=torch.float64))
    # pass@k of trained minus base, over the first k samples
    gain = (len(sets[1]) - len(sets[0])) / P
    assert gain == pytest.approx((counts["expansion"] - counts["shrinkage"]) / P)


def test_a_policy_against_itself_moves_nothing():
    own = solved(scores(0), 0.8, 3)
    parts = shift(own, own)
    assert not parts["expansion"].any()
    assert not parts["shrinkage"].any()
    assert expansion_ratio(0, 0) == 0


def test_exchanged_policies_exchange_expansion_and_shrinkage():
    sides = [solved(scores(seed), 0.9, 4) for seed in (0, 1)]
    one, other = shift(*sides), shift(*sides[::-1])
    assert torch.equal(one["expansion"], other["shrinkage"])
    assert torch.equal(one["preserved"], other["preserved"])


def test_more_samples_solve_no_fewer_contexts():
    counts = [int(solved(scores(2), 0.9, k).sum()) for k in range(1, G + 1)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pytest.mark.parametrize("k", range(1, G + 1))
def test_pass_at_k_is_the_mean_over_all_subsets(k):
    right = scores(3) >= 0.8
    expected = [
        sum(any(row[i] for i in chosen) for chosen in itertools.combinations(range(G), k))
        / math.comb(G, k)
        for row in right.tolist()
    ]
    counts = right.double().sum(1)
    values = pass_at_k(counts, torch.full_like(counts, G), k)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_samples_that_nothing_judged_solve_nothing():
    assert solved(torch.tensor([[torch.nan, 0.2], [torch.nan, 0.9]]), 0.5, 2).tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize("pair", [(14, 21), (1, 30), (30, 1), (5, 5)])
def test_the_ends_of_the_ratio_are_where_wilson_s_test_stops(pair):
    """At an end, the observed share lies z standard errors from the share of the end."""
    e, s = pair
    z = 1.959963984540054
    for end in expansion_ratio_interval(e, s):
        q = end / (1 + end)
        distance = abs(e / (e + s) - q) / math.sqrt(q * (1 - q) / (e + s))
        assert distance == pytest.approx(z, rel=1e-9)
    low, high = expansion_ratio_interval(e, s)
    assert low < expansion_ratio(e, s) < high
    flipped = expansion_ratio_interval(s, e)
    assert flipped == pytest.approx((1 / high, 1 / low))
    wider = expansion_ratio_interval(e, s, level=0.99)
    assert wider[0] < low
    assert wider[1] > high


def test_ratios_without_a_context_on_one_side():
    assert expansion_ratio(3, 0) == math.inf
    assert expansion_ratio_interval(0, 0) == (0.0, math.inf)
    low, high = expansion_ratio_interval(8, 0)
    assert 1 < low < high == math.inf
    low, high = expansion_ratio_interval(0, 8)
    assert 0 == low < high < 1
    assert math.isnan(ratio_gap(math.inf, math.inf))


@pytest.mark.parametrize(
    "act",
    [
        lambda: solved(scores(0), 0.5, 0),
        lambda: solved(scores(0), 0.5, G + 1),
        lambda: expansion_ratio(-1, 0),
        lambda: expansion_ratio_interval(1, 1, level=1.0),
        lambda: shift(torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)),
    ],
)
def test_bad_arguments_are_refused(act):
    with pytest.raises(ValueError):
        act()
