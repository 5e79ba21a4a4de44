"""Products of token ratios along a response equal loops, and correct states and returns exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_mpo.functional.traces import forward_trace, prefix_log_ratios
from tests.support.action_spaces import each_mask, ratios
from tests.support.builders import seeded


def rows_of(values, mask):
    """Return the values of each row within the mask, and their positions."""
    for b in range(len(mask)):
        where = mask[b].nonzero().flatten().tolist()
        yield b, where, [values[b, t].item() for t in where]


@each_mask
@pytest.mark.parametrize("mean", [False, True])
def test_prefixes_equal_a_loop_and_have_the_gradient_of_one_token(mask, mean):
    values = ratios(mask, garbage=7.0).requires_grad_()
    log_ratios, starts, tokens = prefix_log_ratios(values, mask, mean=mean)
    expected = torch.zeros_like(values)
    for b, where, row in rows_of(values, mask):
        for i, t in enumerate(where):
            expected[b, t] = sum(row[: i + 1]) / (i + 1 if mean else 1)
    torch.testing.assert_close(log_ratios, expected)
    assert torch.equal(starts, mask)
    assert torch.equal(tokens, mask.double())
    (gradient,) = torch.autograd.grad(log_ratios.sum(), values)
    assert torch.equal(gradient, mask.double())


@each_mask
@pytest.mark.parametrize("steps", [1, 2, 3, 99])
def test_the_trace_equals_a_loop_over_the_tokens_ahead(mask, steps):
    values = ratios(mask, garbage=7.0)
    expected = torch.ones_like(values)
    for b, where, row in rows_of(values, mask):
        for i, t in enumerate(where):
            expected[b, t] = math.exp(sum(row[i + 1 : i + steps]))
    torch.testing.assert_close(forward_trace(values, mask, steps=steps), expected)


def test_the_whole_trace_makes_the_ratio_of_the_response_a_sum():
    """`Π r - 1 = Σ_t (r_t - 1) Π_{j>t} r_j`: the surrogate with all tokens ahead is the exact objective."""
    values = 0.3 * torch.randn(5, 8, generator=seeded(0), dtype=torch.float64)
    mask = torch.ones(5, 8).bool()
    total = ((values.exp() - 1) * forward_trace(values, mask, steps=8)).sum(1)
    torch.testing.assert_close(total, values.sum(1).exp() - 1)


def test_large_products_stay_finite():
    values = torch.full((1, 50), 5.0)
    mask = torch.ones(1, 50).bool()
    assert torch.isfinite(forward_trace(values, mask, steps=50)).all()
    assert torch.isfinite(forward_trace(-values, mask, steps=50)).all()


def gradients(weigh) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of all responses of two ids, exact under π, and from μ with the weights of `weigh`.

    The credit of a token depends on the tokens before it and on the token itself.
    """
    length, count = 3, 2
    generator = seeded(3)
    logits = torch.randn(length, count, count, generator=generator, dtype=torch.float64)
    other = torch.randn(length, count, count, generator=generator, dtype=torch.float64)
    credit = torch.randn(length, count, count, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    exact, weighted = 0.0, 0.0
    for response in itertools.product(range(count), repeat=length):
        before = (0, *response[:-1])  # a bigram model
        at = list(zip(range(length), before, response, strict=True))
        now = torch.stack([logits[t, a].log_softmax(0)[o] for t, a, o in at])
        old = torch.stack([other[t, a].log_softmax(0)[o] for t, a, o in at])
        gain = torch.stack([credit[t, a, o] for t, a, o in at])
        exact = exact + now.detach().sum().exp() * (gain * now).sum()
        weights = weigh((now - old).detach()[None])[0]
        weighted = weighted + old.sum().exp() * (weights * gain * now).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    return expected, torch.autograd.grad(weighted, logits)[0]


def test_the_product_of_the_prefix_is_unbiased_and_the_ratio_of_the_token_is_not():
    def prefix(log_ratios):
        mask = torch.ones_like(log_ratios).bool()
        return prefix_log_ratios(log_ratios, mask)[0].exp()

    exact, weighted = gradients(prefix)
    torch.testing.assert_close(weighted, exact)
    _, by_token = gradients(torch.exp)
    assert (by_token - exact).abs().max() > 0.01


def test_bad_arguments_are_refused():
    mask = torch.ones(1, 3).bool()
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        forward_trace(torch.zeros(1, 3), mask, steps=0)
    for function in (prefix_log_ratios, lambda *two: forward_trace(*two, steps=2)):
        with pytest.raises(ValueError, match="mask_BT"):
            function(torch.zeros(1, 4), mask)
