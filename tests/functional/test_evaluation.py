"""pass@k, maj@k and intervals over problems, against their definitions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from scipy import stats

from lightning_mpo.functional.evaluation import (
    majority_at_k,
    mean_interval,
    paired_difference,
    pass_at_k,
    student_quantile,
)


def one(right: int, drawn: int, k: int) -> float:
    return pass_at_k(torch.tensor([right]).double(), torch.tensor([drawn]).double(), k).item()


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for k in range(1, n + 1):
        for right in range(n + 1):
            subsets = list(itertools.combinations([i < right for i in range(n)], k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert one(right, n, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("k", "right"), [(1, 1), (10, 3), (500, 1), (100, 900), (999, 0)])
def test_pass_at_k_is_exact_for_a_thousand_completions(k, right):
    exact = float(1 - Fraction(math.comb(1000 - right, k), math.comb(1000, k)))
    assert one(right, 1000, k) == pytest.approx(exact, rel=1e-12, abs=1e-15)


def test_problems_may_have_different_numbers_of_completions():
    values = pass_at_k(torch.tensor([1.0, 1, 0]), torch.tensor([2.0, 4, 3]), 2)
    assert values.tolist() == pytest.approx([1, 0.5, 0])


def vote(votes: tuple[int, ...]) -> float:
    """Return the probability that the right answer (0) wins, ties broken at random."""
    counts = Counter(answer for answer in votes if answer >= 0)
    best = max(counts.values(), default=0)
    winners = [answer for answer, count in counts.items() if count == best]
    return (0 in winners) / len(winners) if winners else 0.0


def test_majority_is_the_mean_over_all_draws():
    generator = torch.Generator().manual_seed(0)
    votes_PG = torch.randint(-1, 4, (40, 7), generator=generator)
    assert {-1, 0, 3} <= set(votes_PG.flatten().tolist())
    for k in range(1, 8):
        expected = [
            sum(vote(draw) for draw in itertools.combinations(row, k)) / math.comb(7, k)
            for row in votes_PG.tolist()
        ]
        assert majority_at_k(votes_PG, k).tolist() == pytest.approx(expected, abs=1e-14)


def test_majority_of_one_is_pass_at_one():
    votes_PG = torch.tensor([[0, 1, -1, 0], [2, 2, 1, 0]])
    right_P = (votes_PG == 0).double().sum(1)
    assert torch.equal(
        majority_at_k(votes_PG, 1), pass_at_k(right_P, torch.full_like(right_P, 4), 1)
    )


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 199, 1318])
def test_quantiles_are_those_of_scipy(degrees):
    for probability in (0.6, 0.9, 0.975, 0.9995):
        expected = stats.t.ppf(probability, degrees)
        assert student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9)


def test_the_interval_is_that_of_student():
    values = [0, 0.5, 1, 0.5, 0.25]
    mean, error = sum(values) / 5, stats.sem(values)
    expected = stats.t.interval(0.9, 4, mean, error)
    assert mean_interval(torch.tensor(values), -9, 9, level=0.9).tolist() == pytest.approx(
        [mean, *expected], rel=1e-9
    )
    _, low, high = mean_interval(torch.tensor([0.0, 1.0])).tolist()
    assert (low, high) == (0.0, 1.0), "cut to the values that are possible"
    assert mean_interval(torch.tensor([3.0, 9.0]), high=math.inf)[2] > 9


def test_equal_values_have_no_interval_of_one_point():
    for problems in (1, 5, 200):
        unseen = 1.959964**2 / (problems + 1.959964**2)
        for value in (0.0, 1.0, 0.5):
            mean, low, high = mean_interval(torch.full((problems,), value)).tolist()
            expected = [value, value * (1 - unseen), value + unseen * (1 - value)]
            assert [mean, low, high] == pytest.approx(expected, abs=1e-6)
    same_P = torch.rand(50, generator=torch.Generator().manual_seed(0))
    mean, low, high = paired_difference(same_P, same_P).tolist()
    assert (mean, low) == (0, -high)
    assert high == pytest.approx(0.0714, abs=1e-4)
    assert mean_interval(torch.full((9,), 7.0), high=math.inf)[2] == 7


def test_a_rounded_mean_stays_within_its_interval():
    for problems in range(1, 300):
        mean, low, high = mean_interval(torch.full((problems,), 0.1)).tolist()
        assert low <= mean <= high


def test_without_problems_there_is_no_number():
    assert mean_interval(torch.zeros(0)).isnan().all()
    assert pass_at_k(torch.zeros(0), torch.zeros(0), 1).shape == (0,)


def test_a_paired_interval_is_narrower_than_two_apart():
    generator = torch.Generator().manual_seed(0)
    first_P = torch.rand(100, generator=generator)
    second_P = (first_P + 0.1 * torch.rand(100, generator=generator)).clamp(max=1)
    mean, low, high = paired_difference(first_P, second_P).tolist()
    assert mean == pytest.approx((second_P - first_P).double().mean().item())
    assert 0 < low < mean < high
    assert high - low < 0.2 * (mean_interval(first_P)[2] - mean_interval(first_P)[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one(1, 3, 0), "`k` must be at least 1, got 0"),
        (lambda: one(1, 3, 4), "`drawn_P` must be at least k = 4, got 3"),
        (lambda: one(4, 3, 1), "`right_P` must be from 0 to `drawn_P`"),
        (lambda: majority_at_k(torch.zeros(1, 3, dtype=torch.long), 4), "from 1 to 3"),
        (lambda: student_quantile(0.4, 3), r"must be in \[0.5, 1\)"),
        (lambda: mean_interval(torch.zeros(2), level=95), "between 0 and 1, got 95"),
        (
            lambda: paired_difference(torch.zeros(2), torch.zeros(3)),
            "must have the shape of `first_P`",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
