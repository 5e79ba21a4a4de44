"""Properties of the full head and of the support head alike."""

import pytest
import torch

from tests.support.head_options import full_logprobs, support_logits, support_logprobs
from tests.support.heads import problem


def both_heads(hidden, weight, tokens, support, **options):
    """Return the differentiable outputs of both heads, summed with fixed factors, and the outputs."""
    full = full_logprobs(hidden, weight, tokens, entropy_grad=True, **options)
    small = support_logprobs(hidden, weight, tokens, support, entropy_grad=True, **options)
    return [*full, *small, support_logits(hidden, weight, support, **options)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_chunks_change_nothing(trained, chunk_size):
    results = []
    for size in (None, chunk_size):
        hidden, weight, _, tokens, support, mask = problem(seed=4)
        hidden.requires_grad_()
        weight.requires_grad_(trained)
        outputs = both_heads(
            hidden, weight, tokens, support, mask_BT=mask, softcap=3.0, chunk_size=size
        )
        sum(x.square().sum() for x in outputs).backward()
        results.append(
            [x.detach() for x in outputs] + [hidden.grad] + ([weight.grad] if trained else [])
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_leading_shapes_and_order_of_rows_do_not_matter():
    hidden, weight, _, tokens, support, mask = problem(seed=5)
    outputs = both_heads(hidden, weight, tokens, support, mask_BT=mask)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    flat = [x.flatten(0, 1)[order] for x in (hidden, tokens, support, mask)]
    shuffled = both_heads(flat[0], weight, flat[1], flat[2], mask_BT=flat[3])
    for one, other in zip(outputs, shuffled, strict=True):
        torch.testing.assert_close(one.flatten(0, 1)[order], other, rtol=1e-12, atol=0)


def test_masked_positions_are_never_read():
    hidden, weight, _, tokens, support, mask = problem(seed=6)
    assert not mask.all()
    clean = hidden.clone().requires_grad_()
    dirty = torch.where(mask.unsqueeze(-1), hidden, torch.nan).requires_grad_()
    bad_tokens = torch.where(mask, tokens, -100)
    bad_support = torch.where(mask.unsqueeze(-1), support, 10**6)
    outputs = both_heads(clean, weight, tokens, support, mask_BT=mask)
    others = both_heads(dirty, weight, bad_tokens, bad_support, mask_BT=mask)
    for one, other in zip(outputs, others, strict=True):
        assert torch.equal(one, other)
        assert (one[~mask] == 0).all()
        (grad_one,) = torch.autograd.grad(one.sum(), clean, retain_graph=True)
        (grad_other,) = torch.autograd.grad(other.sum(), dirty, retain_graph=True)
        assert torch.equal(grad_one, grad_other)
        assert (grad_one[~mask] == 0).all()


def test_an_empty_mask_gives_zeros_and_zero_gradients():
    hidden, weight, _, tokens, support, mask = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    outputs = both_heads(hidden, weight, tokens, support, mask_BT=torch.zeros_like(mask))
    sum(x.sum() for x in outputs).backward()
    assert all((x == 0).all() for x in [*outputs, hidden.grad, weight.grad])


def test_no_grad_keeps_nothing_and_gives_the_same_values():
    hidden, weight, _, tokens, support, mask = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    outputs = both_heads(hidden, weight, tokens, support, mask_BT=mask)
    with torch.no_grad():
        others = both_heads(hidden, weight, tokens, support, mask_BT=mask)
    assert not any(x.requires_grad for x in others)
    assert all(torch.equal(one, other) for one, other in zip(outputs, others, strict=True))


def test_int32_ids_are_as_good_as_int64():
    hidden, weight, _, tokens, support, _ = problem()
    outputs = both_heads(hidden, weight, tokens, support)
    others = both_heads(hidden, weight, tokens.int(), support.int())
    assert all(torch.equal(one, other) for one, other in zip(outputs, others, strict=True))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_bfloat16_is_close_and_keeps_dtypes(dtypes, trained):
    hidden, weight, _, tokens, support, mask = problem(lead=(4, 16), v=97, d=16, k=8)
    hidden, weight = (hidden / 2).to(dtypes[0]), (weight / 2).to(dtypes[1])
    low = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
    high = [hidden.double().requires_grad_(), weight.double().requires_grad_(trained)]
    outputs, exact = (both_heads(*pair, tokens, support, mask_BT=mask) for pair in (low, high))
    for one, other in zip(outputs, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.02)
    for results in (outputs, exact):
        sum(x.sum() for x in results).backward()
    for leaf, other in zip(low[: 1 + trained], high, strict=False):
        assert leaf.grad.dtype == leaf.dtype
        error = (leaf.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 0.02


def test_autocast_changes_nothing():
    hidden, weight, _, tokens, support, _ = problem(dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for enabled in (False, True):
            leaf, head = (
                hidden.to(dtype, copy=True).requires_grad_(),
                weight.clone().requires_grad_(),
            )
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                outputs = both_heads(leaf, head, tokens, support)
                sum(x.sum() for x in outputs).backward()
            results.append([*(x.detach() for x in outputs), leaf.grad, head.grad])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
