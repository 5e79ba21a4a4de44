"""Logistic regression: the gradient at the optimum, limits, and invariances."""

import pytest
import torch

from lightning_mpo.functional.logistic import fit_logistic, logistic_probabilities


def examples(N: int = 60, F: int = 4):
    g = torch.Generator().manual_seed(5)
    features = torch.randn(N, F, generator=g, dtype=torch.float64)
    noise = torch.randn(N, generator=g, dtype=torch.float64)
    return features, features @ torch.tensor([1.0, -2, 0, 0.5]).double() + noise > 0.3


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0])
def test_the_gradient_of_the_penalised_loss_is_0(ridge):
    features, labels = examples()
    weights = fit_logistic(features, labels, ridge).requires_grad_()
    p = logistic_probabilities(features, weights)
    loss = torch.nn.functional.binary_cross_entropy(p, labels.double())
    loss = loss + ridge / 2 * weights[:-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() < 1e-7


def test_the_fit_follows_permutations_and_labels_and_not_copies():
    features, labels = examples()
    weights = fit_logistic(features, labels, 0.01)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fit_logistic(features[order], labels[order], 0.01), weights)
    torch.testing.assert_close(fit_logistic(features, ~labels, 0.01), -weights)
    twice = fit_logistic(features.repeat(2, 1), labels.repeat(2), 0.01)
    torch.testing.assert_close(twice, weights)
    assert torch.equal(fit_logistic(features, labels, 0.01), weights)


def test_a_strong_penalty_leaves_the_share_of_the_class():
    features, labels = examples()
    p = logistic_probabilities(features, fit_logistic(features, labels, 1e6))
    torch.testing.assert_close(p, torch.full_like(p, labels.double().mean()), atol=1e-4, rtol=0)


def test_features_that_sum_to_1_and_separable_classes_converge():
    features = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    labels = torch.tensor([True, True, False, False]).repeat(5)
    p = logistic_probabilities(features, fit_logistic(features, labels, 1e-4))
    assert torch.equal(p > 0.5, labels)
    assert torch.isfinite(p).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridge": 0.0}, "`ridge` must be above 0"),
        ({"labels_N": torch.ones(60, dtype=torch.bool)}, "examples of both classes"),
        ({"features_NF": torch.full((60, 4), torch.nan)}, "`features_NF` must be finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, message):
    features, labels = examples()
    with pytest.raises(ValueError, match=message):
        fit_logistic(**({"features_NF": features, "labels_N": labels, "ridge": 1.0} | change))
