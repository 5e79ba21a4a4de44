"""Weights, counts and draws of a curriculum."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.functional.curriculum import add_counts, draw_rows, learnability


def test_weights_are_highest_for_rows_that_are_solved_half_of_the_time():
    judged_N = torch.full((17,), 16.0)
    weights_N = learnability(torch.arange(17.0), judged_N, floor=0.25)
    assert weights_N.argmax() == 8
    assert weights_N[8] == 1
    assert weights_N.tolist() == pytest.approx(weights_N.flip(0).tolist())
    assert (weights_N[1:9] >= weights_N[:8]).all()
    assert weights_N[0] == weights_N[16] == 0.25
    assert weights_N[4] == pytest.approx(4 * (5 / 18) * (13 / 18))
    assert weights_N.dtype == torch.float64
    with pytest.raises(ValueError, match="must have one shape"):
        learnability(torch.zeros(2), torch.zeros(3))


def test_new_counts_are_added_and_old_ones_fade():
    counts_N2 = torch.zeros(3, 2, dtype=torch.float64)
    for _ in range(2):
        counts_N2 = add_counts(
            counts_N2, torch.tensor([2, 0, 2]), torch.tensor([[1, 4], [0, 4], [3, 4]]), memory=16
        )
    assert counts_N2.tolist() == [[0, 8], [0, 0], [8, 16]]
    # of 16 remembered and 4 new ones, 4/5 of each stay
    counts_N2 = add_counts(counts_N2, torch.tensor([2]), torch.tensor([[0, 4]]), memory=16)
    assert counts_N2[2].tolist() == pytest.approx([6.4, 16])
    assert counts_N2[:2].tolist() == [[0, 8], [0, 0]]
    with pytest.raises(ValueError, match="equally long"):
        add_counts(counts_N2, torch.tensor([2]), torch.zeros(2, 2), memory=16)


def test_draws_follow_the_weights_without_repetition():
    weights_N = torch.tensor([0.0, 1.0, 1.0, 4.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    first = torch.zeros(5)
    for _ in range(2000):
        rows_P = draw_rows(weights_N, 3, generator)
        assert len(rows_P.unique()) == 3
        first[rows_P[0]] += 1
    # five standard errors of a share of 2000 draws
    assert first / 2000 == pytest.approx(weights_N / 8, abs=5 * (0.25 / 2000) ** 0.5)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_all_rows_come_before_one_comes_again(count):
    weights_N = torch.tensor([0.0, 1.0, 1e-6, 4.0, 2.0])
    rows_P = draw_rows(weights_N, count, torch.Generator().manual_seed(1))
    times_N = rows_P.bincount(minlength=5)
    assert len(rows_P) == count
    assert times_N[0] == 0
    assert times_N[1:].max() - times_N[1:].min() <= 1
    with pytest.raises(ValueError, match="must hold a positive weight"):
        draw_rows(torch.zeros(3), 1, torch.Generator())
