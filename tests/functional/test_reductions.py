"""One sum, one denominator."""

import pytest
import torch

from lightning_mpo.functional.reductions import weighted_sum


def problem(rows=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 4, generator=g, dtype=torch.float64)
    weights = torch.randint(0, 4, (rows, 4), generator=g).double()
    weights[2] = 0
    return values, weights


def test_weighted_sum_is_the_definition():
    values, weights = problem()
    expected = 0.0
    for x, w in zip(values.flatten().tolist(), weights.flatten().tolist(), strict=True):
        expected += w * x
    assert float(weighted_sum(values, weights, 7.0)) == pytest.approx(expected / 7, rel=1e-12)
    assert float(weighted_sum(values, weights, torch.tensor(7.0))) == pytest.approx(
        expected / 7, rel=1e-12
    )


def test_values_without_weight_are_never_read():
    values, weights = problem()
    bad = values.where(weights > 0, torch.nan).requires_grad_()
    total = weighted_sum(bad, weights, 7.0)
    total.backward()
    assert torch.equal(total.detach(), weighted_sum(values, weights, 7.0))
    torch.testing.assert_close(bad.grad, weights / 7)


def test_splits_add_up_to_the_whole():
    values, weights = problem()
    whole = weighted_sum(values, weights, weights.sum())
    parts = sum(
        weighted_sum(values[rows], weights[rows], weights.sum())
        for rows in ([0, 3], [1], [2], [4, 5])
    )
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0)
    means = [weighted_sum(values[r], weights[r], weights[r].sum()) for r in ([0, 3], [1], [4, 5])]
    assert abs(float(whole - sum(means) / 3)) > 1e-3  # what goes wrong with local denominators


def test_messages_name_the_argument():
    values, weights = problem()
    with pytest.raises(
        ValueError, match=r"`weights` must have the shape of `values`, \[6, 4\], got \[6\]"
    ):
        weighted_sum(values, weights[:, 0], 1.0)
    with pytest.raises(ValueError, match=r"`denominator` must be above 0, got 0.0"):
        weighted_sum(values, weights, 0.0)
