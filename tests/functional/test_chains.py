"""The probability that all subproblems are solved, against a loop."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mpo.functional.chains import all_solved


def test_it_is_the_product_over_the_subproblems_of_a_problem():
    generator = torch.Generator().manual_seed(0)
    rates_S = torch.randint(0, 5, (30,), generator=generator) / 4
    problem_S = torch.randint(0, 6, (30,), generator=generator)
    solved_P = all_solved(rates_S, problem_S, 7)
    for p in range(6):
        rates = [r for r, q in zip(rates_S.tolist(), problem_S.tolist(), strict=True) if q == p]
        assert solved_P[p].item() == pytest.approx(
            math.prod(rates) if rates else math.nan, nan_ok=True
        )
    assert solved_P[6].isnan()


def test_single_tries_give_an_indicator():
    solved_P = all_solved(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1]), 2)
    assert solved_P.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="must have one shape"):
        all_solved(torch.ones(2), torch.zeros(1, dtype=torch.int64), 1)
