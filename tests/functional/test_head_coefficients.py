"""The coefficient of the heads' policy loss equals a loop, and minimises its quadratic."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.functional.head_coefficients import calibrated_coefficients
from tests.support.builders import seeded


def batch():
    head, policy = (torch.randn(4, 6, 3, generator=seeded(s), dtype=torch.float64) for s in (0, 1))
    alive = torch.rand(4, 6, 3, generator=seeded(2)) < 0.7
    alive[3] = False
    return head, policy, alive


def test_it_equals_a_loop_over_the_tokens_that_count():
    head, policy, alive = batch()
    found = calibrated_coefficients(
        head.masked_fill(~alive, torch.nan), policy.masked_fill(~alive, torch.inf), alive
    )
    for b in range(4):
        for n in range(3):
            pairs = [
                (head[b, t, n].item(), policy[b, t, n].item()) for t in range(6) if alive[b, t, n]
            ]
            product = sum(x * y for x, y in pairs)
            square = sum(x * x for x, _ in pairs)
            assert found[b, n].item() == pytest.approx(product / (square + 1e-8))


def test_it_is_the_share_of_the_heads_that_is_nearest_to_the_policy():
    """λ minimises Σ (δ - λ δ^n)²: the first-order gain less half the second-order cost."""
    head, policy, alive = batch()
    best = calibrated_coefficients(head, policy, alive)

    def distance(coefficients):
        return ((policy - coefficients[:, None] * head).square() * alive).sum(1)

    for step in (-0.01, 0.01):
        assert (distance(best + step) >= distance(best)).all()


def test_on_the_policy_that_sampled_the_heads_have_no_weight():
    head, policy, alive = batch()
    assert not calibrated_coefficients(head, 0 * policy, alive).any()
    assert not calibrated_coefficients(0 * head, 0 * policy, alive).any()


def test_it_has_no_gradient():
    head, policy, alive = batch()
    assert not calibrated_coefficients(head.requires_grad_(), policy, alive).requires_grad


def test_bad_arguments_are_refused():
    head, policy, alive = batch()
    with pytest.raises(ValueError, match="`eps` must be above 0, got 0.0"):
        calibrated_coefficients(head, policy, alive, eps=0.0)
    with pytest.raises(ValueError, match="policy_BTM"):
        calibrated_coefficients(head, policy[:, :3], alive)
