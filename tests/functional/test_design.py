"""Scores of designed properties, against loops."""

import math

import pytest
import torch

from lightning_mpo.functional.design import composition, geometric_mean, range_score


@pytest.mark.parametrize(
    ("low", "high", "margin"), [(2, 9, 2), (-math.inf, 2, 3), (0.5, math.inf, 0.5), (1, 1, 0.1)]
)
def test_a_score_falls_with_the_distance_from_the_range(low, high, margin):
    values = torch.linspace(-5, 15, 81, dtype=torch.float64)
    for value, score in zip(values.tolist(), range_score(values, low, high, margin), strict=True):
        distance = max(low - value, value - high, 0)
        assert float(score) == pytest.approx(max(0, 1 - distance / margin), abs=1e-12)


def test_a_geometric_mean_is_that_of_a_loop_and_follows_no_order():
    scores = torch.rand(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = geometric_mean(scores)
    for row, mean in zip(scores.tolist(), means.tolist(), strict=True):
        assert mean == pytest.approx(math.exp(sum(map(math.log, row)) / 5))
    torch.testing.assert_close(geometric_mean(scores.flip(1)), means)
    scores[3, 2] = 0
    assert geometric_mean(scores)[3] == 0
    assert (means <= scores.mean(1) + 1e-12)[torch.arange(20) != 3].all()


def test_a_composition_counts_the_letters_that_count():
    ids = torch.tensor([[0, 1, 1, 9], [2, 2, 2, 2], [5, 5, 5, 5]])
    mask = torch.tensor([[True, True, True, False], [True] * 4, [False] * 4])
    expected = [[1 / 3, 2 / 3, 0], [0, 0, 1], [0, 0, 0]]
    torch.testing.assert_close(
        composition(ids, mask, 3), torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x: range_score(x, 2, 1, 1), "`low` must be at most `high`"),
        (lambda x: range_score(x, 1, 2, 0), "`margin` above 0"),
        (lambda x: geometric_mean(-x[None]), "none below 0"),
    ],
)
def test_bad_arguments_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(torch.ones(3))
