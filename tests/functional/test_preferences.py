"""Pairs of responses and the loss of DPO: against loops, and in limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.preferences import pair_margins, pairwise_logistic, preferences
from tests.support.builders import seeded

P, G = 6, 5
GROUP = torch.arange(P).repeat_interleave(G)
VALID = torch.rand(P * G, generator=seeded(1)) < 0.7
VALID[:G] = torch.tensor([True, False, False, False, False])  # one valid row: no pair
kinds = pytest.mark.parametrize("pairs", ["extremes", "all"])


def rewards(seed: int = 0) -> Tensor:
    """Return rewards with ties; those of the last group are all equal."""
    values = torch.randint(0, 4, (P * G,), generator=seeded(seed)).double() / 3
    values[-G:] = 0.1
    return values


def pairs_of(values: Tensor, valid: Tensor, pairs: str) -> list[tuple[int, int]]:
    """Return (better, worse) rows, by a loop over groups."""
    found = []
    for p in range(P):
        rows = [b for b in range(p * G, p * G + G) if valid[b]]
        if pairs == "all":
            found += [(i, j) for i in rows for j in rows if values[i] > values[j]]
        elif rows:
            best, worst = max(rows, key=values.__getitem__), min(rows, key=values.__getitem__)
            found += [(best, worst)] if values[best] > values[worst] else []
    return found


@kinds
def test_wins_less_losses_against_a_loop_over_pairs(pairs):
    advantages, paired = preferences(rewards(), G, pairs=pairs, valid_B=VALID)
    expected, there = [0.0] * (P * G), [False] * (P * G)
    for i, j in pairs_of(rewards(), VALID, pairs):
        expected[i], expected[j] = expected[i] + 1, expected[j] - 1
        there[i] = there[j] = True
    assert advantages.tolist() == expected
    assert paired.tolist() == there
    assert not paired[:G].any()
    assert not paired[-G:].any()


@kinds
def test_rows_that_are_not_valid_may_hold_anything(pairs):
    garbage = torch.where(VALID, rewards(), torch.nan)
    for one, other in zip(
        preferences(garbage, G, pairs=pairs, valid_B=VALID),
        preferences(rewards(), G, pairs=pairs, valid_B=VALID),
        strict=True,
    ):
        assert torch.equal(one, other)


@kinds
def test_loss_and_gradient_against_a_loop_over_pairs(pairs):
    beta, log_ratios = 0.7, 3 * torch.randn(P * G, generator=seeded(2), dtype=torch.float64)
    advantages, paired = preferences(rewards(), G, pairs=pairs, valid_B=VALID)
    leaf = log_ratios.clone().requires_grad_()
    losses = pairwise_logistic(leaf, advantages, GROUP, beta=beta, mask_B=paired)
    found = pairs_of(rewards(), VALID, pairs)
    expected, gradient = [0.0] * (P * G), [0.0] * (P * G)
    for p in range(P):
        own = [(i, j) for i, j in found if i // G == p]
        rows = [b for b in range(p * G, p * G + G) if paired[b]]
        for i, j in own:
            margin = beta * (log_ratios[i] - log_ratios[j]).item()
            for b in rows:
                expected[b] += math.log1p(math.exp(-margin)) / len(own)
            slope = -beta / (1 + math.exp(margin)) * len(rows) / len(own)
            gradient[i] += slope
            gradient[j] -= slope
    torch.testing.assert_close(losses, torch.tensor(expected).double())
    torch.testing.assert_close(
        torch.autograd.grad(losses.sum(), leaf)[0], torch.tensor(gradient).double()
    )


@kinds
def test_a_small_beta_is_the_policy_gradient_of_wins_less_losses(pairs):
    """The loss of a pair is log 2 - β/2 (d_w - d_l) + O(β²); rows and pairs are those of a group."""
    beta = 1e-7
    advantages, paired = preferences(rewards(), G, pairs=pairs)
    leaf = torch.randn(P * G, generator=seeded(3), dtype=torch.float64).requires_grad_()
    loss = pairwise_logistic(leaf, advantages, GROUP, beta=beta, mask_B=paired).sum()
    gradient = torch.autograd.grad(loss, leaf)[0] / (beta / 2)
    found = [i // G for i, _ in pairs_of(rewards(), torch.ones_like(VALID), pairs)]
    counts = torch.tensor([found.count(p) for p in range(P)]).repeat_interleave(G)
    rows = paired.view(P, G).sum(1).repeat_interleave(G)
    expected = -advantages * rows / counts.clamp(min=1)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert expected.any()


def test_margins_grow_with_beta_and_are_of_pairs_alone():
    d, gains = torch.tensor([1.0, 0.0, -1.0, 5.0]), torch.tensor([0.5, 2.0, -1.0, -1.0])
    group = torch.tensor([4, 4, 4, 9])
    margins, pairs = pair_margins(d, gains, group, beta=0.5)
    assert pairs.nonzero().tolist() == [[0, 2], [1, 0], [1, 2]]
    assert margins[pairs].tolist() == [1.0, -0.5, 0.5]
    mask = torch.tensor([True, True, False, True])
    assert pair_margins(d, gains, group, beta=0.5, mask_B=mask)[1].nonzero().tolist() == [[1, 0]]


def test_large_log_ratios_stay_finite():
    for gap in (1e4, -1e4):
        d = torch.tensor([gap, -gap], requires_grad=True)
        losses = pairwise_logistic(d, torch.tensor([1.0, -1.0]), torch.tensor([0, 0]), beta=1.0)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(torch.autograd.grad(losses.sum(), d)[0]).all()


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="`pairs` must be 'extremes' or 'all', got 'best'"):
        preferences(torch.zeros(2), 2, pairs="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must hold whole groups"):
        preferences(torch.zeros(3), 2)
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="`beta` must be above 0, got 0"):
        pairwise_logistic(one, one, torch.zeros(1, dtype=torch.long), beta=0)
    with pytest.raises(TypeError, match="`group_B` must be int32 or int64"):
        pairwise_logistic(one, one, one, beta=0.1)
