"""`PassAtK` against its definition."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lightning_mpo.metrics import PassAtK


def rows(counts: list[int], n: int) -> Tensor:
    return torch.arange(n) < torch.tensor(counts)[:, None]


def measured(k: int, correct_PG: Tensor) -> PassAtK:
    metric = PassAtK(k)
    metric.update(correct_PG)
    return metric


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_equals_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for k in range(1, n + 1):
        for correct in range(n + 1):
            row = [i < correct for i in range(n)]
            subsets = list(itertools.combinations(row, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert measured(k, torch.tensor([row])).compute().item() == pytest.approx(
                expected, abs=1e-15
            )


@pytest.mark.parametrize(
    ("k", "correct"), [(1, 1), (10, 3), (500, 1), (100, 900), (1000, 1), (999, 0)]
)
def test_is_exact_for_a_thousand_completions(k: int, correct: int) -> None:
    exact = float(1 - Fraction(math.comb(1000 - correct, k), math.comb(1000, k)))
    assert measured(k, rows([correct], 1000)).compute().item() == pytest.approx(
        exact, rel=1e-12, abs=1e-15
    )


def test_is_the_mean_over_problems_not_over_batches() -> None:
    metric = PassAtK(1)
    metric.update(rows([4], 4))
    metric.update(rows([0, 0, 0], 4))
    assert metric.compute().item() == 0.25
    metric.reset()
    metric.update(rows([1], 2))
    assert metric.compute().item() == 0.5


def test_groups_may_differ_in_size() -> None:
    metric = PassAtK(2)
    metric.update(rows([1], 2))
    metric.update(rows([1], 4))
    assert metric.compute().item() == pytest.approx((1 + 0.5) / 2)


def test_merged_states_equal_one() -> None:
    left, right, both = PassAtK(2), PassAtK(2), PassAtK(2)
    left.update(rows([0, 2, 3], 5))
    right.update(rows([1, 5], 6))
    both.update(rows([0, 2, 3], 5))
    both.update(rows([1, 5], 6))
    left.merge_state(right)
    assert left.compute() == both.compute()
    assert left.interval() == both.interval()


def test_sums_over_ranks() -> None:
    """Two ranks, played by a gather that returns this rank's state and that of another."""
    theirs = measured(1, rows([4, 4, 4], 4))
    states = iter([theirs.problems, theirs.total, theirs.squares] * 2)
    metric = PassAtK(
        1,
        distributed_available_fn=lambda: True,
        dist_sync_fn=lambda mine, group: [mine, next(states)],
    )
    metric.update(rows([0], 4))
    assert metric.compute().item() == 0.75
    together = measured(1, rows([0, 4, 4, 4], 4))
    assert metric.interval() == pytest.approx(together.interval())
    assert metric.problems == 1  # what is synchronised for a result is given back


def test_interval_by_hand() -> None:
    low, high = measured(1, rows([0, 1, 2, 1], 2)).interval(level=0.95)
    values = [0, 0.5, 1, 0.5]
    error = 1.959964 * math.sqrt(sum((v - 0.5) ** 2 for v in values) / 3 / 4)
    assert (low, high) == pytest.approx((0.5 - error, 0.5 + error), abs=1e-6)
    wide = measured(1, rows([0, 1, 2, 1], 2)).interval(level=0.999)
    assert wide[0] < low < high < wide[1]


def test_interval_stays_inside_and_does_not_shrink_to_a_point() -> None:
    assert measured(1, rows([0, 2], 2)).interval() == (0.0, 1.0)
    low, high = measured(1, rows([4] * 20, 4)).interval()
    assert (low, high) == pytest.approx((0.838875, 1.0), abs=1e-6)  # Wilson, 20 of 20
    assert measured(1, rows([0] * 20, 4)).interval() == pytest.approx((1 - high, 1 - low))
    low, high = measured(1, rows([1], 2)).interval()
    assert 0 < low < 0.5 < high < 1


def test_interval_holds_the_mean_at_every_number_of_problems() -> None:
    for right in (False, True):
        for problems in range(1, 1000):
            metric = PassAtK(1)
            metric.update(torch.full((problems, 1), right))
            low, high = metric.interval()
            assert low <= metric.compute().item() <= high


@pytest.mark.parametrize("k", [1, 4])
def test_interval_covers_the_truth(k: int) -> None:
    """Problems of different difficulty; 95 % of the intervals hold the true mean.

    Of 2,000 intervals five standard errors are 0.024: a false alarm in 6e-7 of generators.
    """
    generator = torch.Generator().manual_seed(0)
    P, G, runs, covered = 100, 8, 2000, 0
    truth = (
        sum(1 - (1 - p) ** k for p in torch.linspace(0, 1, 100_001, dtype=torch.float64).tolist())
        / 100_001
    )
    for _ in range(runs):
        difficulty_P1 = torch.rand(P, 1, generator=generator)
        low, high = measured(k, torch.rand(P, G, generator=generator) < difficulty_P1).interval()
        covered += low <= truth <= high
    assert abs(covered / runs - 0.95) < 5 * math.sqrt(0.95 * 0.05 / runs)


def test_nothing_seen() -> None:
    assert PassAtK(1).compute().isnan()
    assert all(map(math.isnan, PassAtK(1).interval()))


def test_errors() -> None:
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        PassAtK(0)
    with pytest.raises(ValueError, match="at least k = 4 completions per problem, got 3"):
        PassAtK(4).update(rows([1], 3))
    with pytest.raises(
        ValueError,
        match=r"`correct_PG` must be bool of shape \[P, G\], got torch.float32 of \(2, 3\)",
    ):
        PassAtK(1).update(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"got torch.bool of \(3,\)"):
        PassAtK(1).update(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="`level` must lie between 0 and 1, got 95"):
        measured(1, rows([1], 2)).interval(level=95)
