"""DAPO's soft overlong punishment."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.functional.lengths import overlong_penalty

LIMIT, BUFFER = 20480, 4096


def naive(n: float, limit: int, buffer: int, factor: float) -> float:
    if n <= limit - buffer:
        return 0.0
    return -factor * (n - limit + buffer) / buffer if n <= limit else -factor


def test_related_spec_9_10_invariant_7():
    lengths = torch.tensor([0, 16384, 18432, 20480, 20481, 40000], dtype=torch.float64)
    assert overlong_penalty(lengths, LIMIT, BUFFER).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(("limit", "buffer", "factor"), [(20, 6, 1.0), (20, 20, 0.25), (7, 1, 3.0)])
def test_against_the_formula_by_cases(limit, buffer, factor):
    lengths = torch.arange(limit + 9, dtype=torch.float64)
    expected = [naive(n, limit, buffer, factor) for n in lengths.tolist()]
    torch.testing.assert_close(
        overlong_penalty(lengths, limit, buffer, factor), torch.tensor(expected).double()
    )
    shape = (1, 3, 3)
    assert torch.equal(
        overlong_penalty(lengths[:9].view(shape), limit, buffer, factor),
        overlong_penalty(lengths[:9], limit, buffer, factor).view(shape),
    )


def test_it_is_continuous_and_never_rises():
    lengths = torch.linspace(16000, 21000, 50_001, dtype=torch.float64)
    steps = overlong_penalty(lengths, LIMIT, BUFFER).diff()
    assert (steps <= 0).all()
    assert steps.abs().max() < 0.1 / BUFFER * 1.001  # a step of a tenth of a token


def test_verls_formula_is_the_same_up_to_the_limit():
    lengths = torch.arange(0, LIMIT + 1, 7, dtype=torch.float64)
    verl = torch.minimum(-(lengths - (LIMIT - BUFFER)) / BUFFER * 1.0, torch.zeros(()).double())
    torch.testing.assert_close(overlong_penalty(lengths, LIMIT, BUFFER), verl)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((10, 0), "`buffer` must be between 1 and `limit` = 10, got 0"),
        ((10, 11), "`buffer` must be between 1 and `limit` = 10, got 11"),
        ((10, 5, 0.0), "`factor` must be above 0, got 0.0"),
        ((10, 5, float("nan")), "`factor` must be above 0, got nan"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        overlong_penalty(torch.ones(1), *options)
