"""Weights between sampler and trainer against loops, and what bounds do to them."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mpo.functional.corrections import masked, sampler_weights, truncated
from tests.support.builders import right_padded, seeded

LENGTHS = [5, 1, 7, 0, 3]
MASK = right_padded(LENGTHS, 8)
OLD, BEHAVIOUR = (-torch.rand(5, 8, generator=seeded(s), dtype=torch.float64) * 3 for s in (0, 1))
GARBAGE = torch.where(MASK, 0.0, torch.nan)


@pytest.mark.parametrize("sequence", [False, True])
def test_weights_are_ratios_of_tokens_or_their_product_over_a_response(sequence):
    weights = sampler_weights(OLD + GARBAGE, BEHAVIOUR - GARBAGE, MASK, sequence=sequence)
    for b, length in enumerate(LENGTHS):
        ratios = [math.exp(OLD[b, t].item() - BEHAVIOUR[b, t].item()) for t in range(length)]
        expected = [math.prod(ratios)] * length if sequence else ratios
        assert weights[b].tolist() == pytest.approx(expected + [1.0] * (8 - length), rel=1e-10)


def test_a_sampler_that_agrees_weighs_everything_one_and_no_gradient_flows():
    for sequence in (False, True):
        weights = sampler_weights(OLD.clone().requires_grad_(), OLD, MASK, sequence=sequence)
        assert torch.equal(weights, torch.ones_like(OLD))
        assert not weights.requires_grad


def test_absurd_weights_stay_finite():
    far = torch.full_like(OLD, 1e4)
    for sign in (-1, 1):
        assert torch.isfinite(sampler_weights(sign * far, 0 * far, MASK, sequence=True)).all()


def test_bounds_are_those_of_a_loop():
    weights = sampler_weights(OLD, BEHAVIOUR, MASK)
    below = truncated(weights, cap=1.5)
    within = masked(weights, low=0.5, cap=1.5)
    for b in range(5):
        for t in range(8):
            w = weights[b, t].item()
            assert below[b, t].item() == min(w, 1.5)
            assert within[b, t].item() == (w if 0.5 <= w <= 1.5 else 0.0)
    assert (within == 0).any()
    assert (within > 0).any()
    edges = torch.tensor([0.5, 1.5])
    assert torch.equal(masked(edges, low=0.5, cap=1.5), edges)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncated(OLD, cap=0.0), "`cap` must be above 0, got 0.0"),
        (
            lambda: masked(OLD, low=2.0, cap=2.0),
            r"`low` must be in \[0, cap\), got 2.0 and cap 2.0",
        ),
        (lambda: masked(OLD, low=-1.0, cap=2.0), r"`low` must be in \[0, cap\), got -1.0"),
        (lambda: sampler_weights(OLD, BEHAVIOUR[:, 1:], MASK), "behaviour_logprobs_BT"),
    ],
)
def test_options_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
