"""The bound of BGPO against its target, A exp(mean_j d_j)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.linear_bound import linear_bound
from tests.support.builders import seeded

SIGNS = [2.0, 0.5, -0.5, -2.0]
signs = pytest.mark.parametrize("advantage", SIGNS)


def differences(samples: int = 5, rows: int = 300) -> Tensor:
    """Return random differences of ELBO samples, some of them large. Shape `[B, N]`."""
    noise = torch.randn(rows, samples, generator=seeded(0), dtype=torch.float64)
    scale = torch.logspace(-3, 0.8, rows, dtype=torch.float64)[:, None]
    return noise * scale


def bound(d_BN: Tensor, advantage: float) -> Tensor:
    """Return the mean of the samples' bounds, `[B]`."""
    return -linear_bound(d_BN, torch.full_like(d_BN, advantage)).mean(1)


def target(d_BN: Tensor, advantage: float) -> Tensor:
    return advantage * d_BN.mean(1).exp()


@signs
def test_the_bound_is_below_its_target(advantage):
    d_BN = differences()
    assert (bound(d_BN, advantage) <= target(d_BN, advantage) + 1e-12).all()
    assert (bound(d_BN, advantage) < target(d_BN, advantage) - 1e-3).any(), "it is no identity"


@signs
def test_at_the_old_policy_it_touches_with_equal_gradient(advantage):
    gradients = []
    for function in (bound, target):
        d_BN = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
        value_B = function(d_BN, advantage)
        assert value_B.tolist() == [advantage] * 3
        gradients.append(torch.autograd.grad(value_B.sum(), d_BN)[0])
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(gradients[0], torch.full((3, 5), advantage / 5).double())


@pytest.mark.parametrize("advantage", [-0.5, -2.0])
def test_one_sample_of_a_bad_response_is_tight_everywhere(advantage):
    d_BN = differences(samples=1)
    torch.testing.assert_close(bound(d_BN, advantage), target(d_BN, advantage))


def test_one_sample_of_a_good_response_is_the_tangent():
    d_BN = torch.tensor([[-3.0], [-1.0], [0.0], [2.0]], dtype=torch.float64)
    assert bound(d_BN, 1.0).tolist() == [-2.0, 0.0, 1.0, 3.0]


def test_an_advantage_of_zero_has_no_gradient():
    d_BN = differences().requires_grad_()
    loss = linear_bound(d_BN, torch.zeros_like(d_BN))
    assert (loss == 0).all()
    assert (torch.autograd.grad(loss.sum(), d_BN)[0] == 0).all()


def test_gradients_of_single_samples_add_up_to_that_of_all():
    d_BN = differences(rows=4).requires_grad_()
    advantages_BN = torch.tensor(SIGNS, dtype=torch.float64)[:, None].expand_as(d_BN)
    together = torch.autograd.grad(linear_bound(d_BN, advantages_BN).sum(), d_BN)[0]
    single = torch.zeros_like(together)
    for j in range(d_BN.shape[1]):
        loss = linear_bound(d_BN[:, j : j + 1], advantages_BN[:, j : j + 1]).sum()
        single += torch.autograd.grad(loss, d_BN)[0]
    torch.testing.assert_close(together, single)


def test_beyond_the_limit_the_exponential_is_constant():
    d = torch.tensor([[1.0, 3.0, 500.0]], requires_grad=True)
    loss = linear_bound(d, -torch.ones(1, 3), limit=2.0)
    assert loss[0].tolist() == pytest.approx([2.718282, 7.389056, 7.389056])
    assert torch.autograd.grad(loss.sum(), d)[0][0, 1:].tolist() == [0, 0]


def test_wrong_shapes_and_limits_are_refused():
    with pytest.raises(ValueError, match="advantages_BU"):
        linear_bound(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="`limit` must be above 0"):
        linear_bound(torch.zeros(2, 3), torch.zeros(2, 3), limit=0.0)
