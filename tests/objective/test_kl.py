"""The KL penalty and its controllers."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.kl import (
    AdaptiveCoefficient,
    ConstantCoefficient,
    Controller,
    KLPenalty,
)
from tests.support.builders import seeded, subclasses

CONTROLLERS = [
    ConstantCoefficient,
    lambda c: AdaptiveCoefficient(target=0.1, coefficient=c, horizon=1000),
]


def test_the_list_has_every_controller():
    assert subclasses(Controller) == {type(make(0.1)) for make in CONTROLLERS}


@pytest.mark.parametrize("make", CONTROLLERS)
def test_a_controller_starts_where_it_is_told_and_stays_positive_and_finite(make):
    controller = make(0.3)
    assert controller.coefficient == 0.3
    for divergence in (0.0, 1e9, 0.0, 0.0, 0.1):
        for rows in (1, 100, 1_000_000):
            before = controller.coefficient
            controller.update(divergence, rows)
            assert 0 < controller.coefficient < math.inf
            assert 0.8 * before - 1e-12 <= controller.coefficient <= 1.2 * before + 1e-12


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k1_is_refused_in_the_loss_and_only_there(estimator):
    KLPenalty(ConstantCoefficient(), estimator="k1", place="reward")
    for place in ("loss", "reward"):
        KLPenalty(ConstantCoefficient(), estimator=estimator, place=place)
    with pytest.raises(
        UserError, match=r"k1 in the loss has an expected gradient of zero; use `estimator: k3`"
    ):
        KLPenalty(ConstantCoefficient(), estimator="k1", place="loss")


def test_why_k1_is_refused():
    """Over all tokens of a categorical, weighted by their probability, k1's gradient vanishes; k2's is the KL's."""
    logits = torch.randn(6, generator=seeded(0), dtype=torch.float64).requires_grad_()
    reference = torch.randn(6, generator=seeded(1), dtype=torch.float64).log_softmax(0)
    weights = logits.detach().softmax(0)
    logprobs = logits.log_softmax(0)
    exact = torch.autograd.grad(
        (logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True
    )[0]

    def expected_gradient(estimator: str) -> torch.Tensor:
        penalty = KLPenalty(ConstantCoefficient(), estimator=estimator, place="reward")
        return torch.autograd.grad(
            (weights * penalty.divergence(logprobs, reference)).sum(), logits, retain_graph=True
        )[0]

    assert expected_gradient("k1").abs().max() < 1e-12
    torch.testing.assert_close(expected_gradient("k2"), exact)
    assert exact.abs().max() > 0.01


def test_the_estimates_by_hand():
    now, reference = torch.tensor([[-1.0, -2.0]]).double(), torch.tensor([[-1.5, -1.0]]).double()
    expected = {
        "k1": [[0.5, -1.0]],
        "k2": [[0.125, 0.5]],
        "k3": [[math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1]],
    }
    for estimator, values in expected.items():
        penalty = KLPenalty(ConstantCoefficient(), estimator=estimator, place="reward")
        torch.testing.assert_close(
            penalty.divergence(now, reference), torch.tensor(values).double()
        )


def test_the_constant_coefficient_never_changes():
    controller = ConstantCoefficient(0.02)
    controller.update(5.0, 100)
    assert controller.coefficient == 0.02


@pytest.mark.parametrize(
    ("divergence", "factor"),
    [(0.05, 0.98), (0.09, 0.99), (0.1, 1.0), (0.11, 1.01), (0.2, 1.02), (9.0, 1.02)],
)
def test_the_adaptive_coefficient_follows_the_error_by_at_most_a_fifth_per_horizon(
    divergence, factor
):
    controller = AdaptiveCoefficient(target=0.1, coefficient=0.5, horizon=1000)
    controller.update(divergence, rows=100)
    assert controller.coefficient == pytest.approx(0.5 * factor)


def test_a_controller_in_a_loop_finds_its_target():
    """A toy policy whose divergence is inversely proportional to the coefficient."""
    controller = AdaptiveCoefficient(target=0.1, coefficient=0.01, horizon=200)
    for _ in range(400):
        controller.update(0.02 / controller.coefficient, rows=100)
    assert 0.02 / controller.coefficient == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("arguments", [{"target": 0.0}, {"target": 0.1, "horizon": 0}])
def test_an_adaptive_coefficient_without_target_or_horizon_is_refused(arguments):
    with pytest.raises(UserError, match=r"`AdaptiveCoefficient.(target|horizon)` must be"):
        AdaptiveCoefficient(**arguments)
