"""Diagnostics against plain counts and sums."""

import math

import pytest
import torch

from lightning_mpo.functional.diagnostics import (
    clip_fraction,
    effective_sample_size,
    kept_mass,
    score_variance,
    weight_moments,
)
from lightning_mpo.functional.surrogates import clipped_ratio


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_clip_fraction_marks_the_actions_without_gradient():
    log_ratios, advantages = (randn(50, 4) / 2).requires_grad_(), randn(50, 4, seed=1)
    clipped_ratio(log_ratios, advantages, low=0.2, high=0.3).sum().backward()
    marks = clip_fraction(log_ratios, advantages, low=0.2, high=0.3)
    assert torch.equal(marks == 1, log_ratios.grad == 0)
    assert 0.1 < float(marks.mean()) < 0.9
    assert not marks.requires_grad


def test_effective_sample_size_is_the_definition_and_adds_up():
    log_weights, mask = randn(6, 5), randn(6, 5, seed=1) > 0
    weights = [math.exp(x) for x in log_weights[mask].tolist()]
    expected = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    whole = weight_moments(log_weights, mask)
    assert float(effective_sample_size(whole)) == pytest.approx(expected, rel=1e-12)
    parts = weight_moments(log_weights[:2], mask[:2]) + weight_moments(log_weights[2:], mask[2:])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0)
    one_of_many = torch.tensor([0.0] + [-200.0] * 9)
    assert float(effective_sample_size(weight_moments(one_of_many, torch.ones(10).bool()))) == pytest.approx(0.1)


def test_kept_mass_is_the_mass_of_the_support():
    logits = randn(30, 9)
    full, support = logits.log_softmax(-1), logits[:, :4].log_softmax(-1)
    for chosen in range(4):
        kept = kept_mass(full[:, chosen], support[:, chosen])
        torch.testing.assert_close(kept, logits.softmax(-1)[:, :4].sum(-1), rtol=1e-12, atol=0)


def test_score_variance_is_the_trace_of_the_covariance():
    logits, mask = randn(2, 3, 5), randn(2, 3, 5, seed=1) > -0.5
    mask[..., 0] = True
    result = score_variance(logits.masked_fill(~mask, torch.nan), mask)
    for b in range(2):
        for t in range(3):
            p = logits[b, t][mask[b, t]].softmax(0)
            covariance = torch.diag(p) - torch.outer(p, p)
            trace = sum(float(covariance[i, i]) for i in range(len(p)))
            assert float(result[b, t]) == pytest.approx(trace, rel=1e-10, abs=1e-14)


def test_a_top_k_softmax_never_has_the_larger_variance():  # core specification, 2.7 invariant 10
    logits = randn(1, 500, 20) * torch.linspace(0.1, 4, 500).view(1, 500, 1).double()
    full = score_variance(logits)
    for k in (1, 2, 5, 19):
        assert (score_variance(logits.topk(k, -1).values) <= full + 1e-12).all()


def test_messages_name_the_argument():
    with pytest.raises(TypeError, match="`mask` must be bool"):
        weight_moments(randn(3), randn(3))
    with pytest.raises(ValueError, match=r"`advantages_BU` must have shape \[B=2, U=3\]"):
        clip_fraction(randn(2, 3), randn(2, 2), low=0.2, high=0.2)
    with pytest.raises(ValueError, match="`support_logprobs` must have the shape of `logprobs`"):
        kept_mass(randn(3), randn(2))
