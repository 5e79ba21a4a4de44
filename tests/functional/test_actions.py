"""Log-ratios of blocks against plain loops, and the invariants of MPO (docs/algorithms.md 16.1)."""

import math

import pytest
import torch

from lightning_mpo.functional.actions import (
    block_log_ratios,
    segment_log_ratios,
    sequence_log_ratios,
)
from lightning_mpo.functional.block_weights import block_weights, geometric_weights
from lightning_mpo.functional.surrogates import clipped_ratio
from tests.support.ratios import MASKS, B, T, ratios


def loop_blocks(columns, mask, beta, stride, renorm):
    """One row at a time: find runs of the mask, cut them, add up. ``columns(t, n)`` is ℓ_n(t)."""
    values, starts, counts = [0.0] * len(mask), [False] * len(mask), [0] * len(mask)
    t = 0
    while t < len(mask):
        if not mask[t]:
            t += 1
            continue
        end = t
        while end < len(mask) and mask[end]:
            end += 1
        for first in range(t, end, stride):
            inside = [n for n in range(len(beta)) if first + n < end]
            factor = sum(beta) / sum(beta[n] for n in inside) if renorm else 1.0
            values[first] = factor * sum(beta[n] * columns(first, n) for n in inside)
            starts[first], counts[first] = True, min(stride, end - first)
        t = end
    return values, starts, counts


@pytest.mark.parametrize(
    ("n", "stride"), [(1, 1), (3, 1), (3, 2), (3, 3), (5, 5), (12, 1), (12, 12)]
)
@pytest.mark.parametrize("tail", [None, "absorb", "renorm"])
@pytest.mark.parametrize("source", ["backbone", "heads"])
def test_blocks_are_the_definition(n, stride, tail, source):
    weights = geometric_weights(n, 0.6)
    given = ratios(B, T) if source == "backbone" else ratios(B, T, n)
    values, starts, tokens = block_log_ratios(given, MASKS, weights, stride=stride, tail=tail)
    renorm = tail == "renorm" or (tail is None and stride > 1)
    for b in range(B):

        def column(t, i, row=given[b]):
            return float(row[t + i] if source == "backbone" else row[t, i])

        expected = loop_blocks(column, MASKS[b].tolist(), weights.tolist(), stride, renorm)
        assert values[b].tolist() == pytest.approx(expected[0], rel=1e-12, abs=1e-15)
        assert starts[b].tolist() == expected[1]
        assert tokens[b].tolist() == expected[2]


@pytest.mark.parametrize(("n", "stride"), [(1, 1), (4, 1), (4, 2), (4, 4), (12, 5)])
def test_actions_stand_for_all_response_tokens(n, stride):
    _, starts, tokens = block_log_ratios(ratios(B, T), MASKS, block_weights(n, 0.2), stride=stride)
    assert torch.equal(tokens.sum(1), MASKS.sum(1).double())
    assert torch.equal(starts, tokens > 0)
    assert not (starts & ~MASKS).any()


@pytest.mark.parametrize("source", ["backbone", "heads"])
def test_a_block_of_one_is_the_token_method(source):  # invariants 1 and 6
    given = ratios(B, T) if source == "backbone" else ratios(B, T, 1)
    values, starts, tokens = block_log_ratios(given, MASKS, block_weights(1, 0.2))
    assert torch.equal(values, given.view(B, T) * MASKS)
    assert torch.equal(starts, MASKS)
    assert torch.equal(tokens, MASKS.double())
    first_only = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    heads = ratios(B, T, 3)
    assert torch.equal(block_log_ratios(heads, MASKS, first_only)[0], heads[..., 0] * MASKS)


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_ratios_are_one_where_the_policies_agree(n, share):  # invariant 2
    for shape in ((B, T), (B, T, n)):
        for stride in (1, n):
            values, _, _ = block_log_ratios(
                torch.zeros(shape), MASKS, block_weights(n, share), stride=stride
            )
            assert torch.equal(values.exp(), torch.ones(B, T))


def test_equal_ratios_stay_what_they_are():  # invariant 3
    values, _, _ = block_log_ratios(
        torch.full((1, T), 0.3, dtype=torch.float64), MASKS[4:], block_weights(4, 0.3)
    )
    assert values[0, : T - 3].tolist() == pytest.approx([0.3] * (T - 3), rel=1e-12)
    assert values[0, -1].item() == pytest.approx(0.3 * 0.7, rel=1e-12)
    renormed, _, _ = block_log_ratios(
        torch.full((1, T), 0.3, dtype=torch.float64),
        MASKS[4:],
        block_weights(4, 0.3),
        tail="renorm",
    )
    assert renormed[0].tolist() == pytest.approx([0.3] * T, rel=1e-12)


def test_weights_of_one_give_the_product():  # invariant 4
    given = ratios(1, T)
    values, _, _ = block_log_ratios(given, MASKS[4:], torch.ones(3))
    for t in range(T - 2):
        product = math.prod(math.exp(float(given[0, t + i])) for i in range(3))
        assert math.exp(float(values[0, t])) == pytest.approx(product, rel=1e-12)


def coefficients(n, share, stride, tail=None, mask=MASKS[4:]):
    """Gradient of the on-policy loss per token: what its log-probability is multiplied with."""
    logprobs = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
    values, starts, tokens = block_log_ratios(
        logprobs, mask, block_weights(n, share), stride=stride, tail=tail
    )
    losses = clipped_ratio(values, torch.ones_like(values), low=0.2, high=0.2)
    (losses * tokens)[starts].sum().backward()
    return (-logprobs.grad[0]).tolist()


def test_sliding_on_policy_gradient_is_the_token_gradient():  # invariant 5
    assert coefficients(1, 0.0, 1) == pytest.approx([1.0] * T, rel=1e-12)
    expected = [0.7, 0.775, 0.85, 0.925] + [1.0] * (T - 4)  # beta_0, beta_0 + beta_1, …
    assert coefficients(5, 0.3, 1) == pytest.approx(expected, rel=1e-12)
    assert max(coefficients(5, 0.3, 1, tail="renorm")) == pytest.approx(
        1.34, abs=0.005
    )  # what docs/algorithms.md 3.4 warns of


def test_disjoint_on_policy_gradient():  # invariant 8, and why disjoint blocks want uniform weights
    uniform = 1 - 1 / 5
    assert coefficients(5, uniform, 5) == pytest.approx([1.0] * T, rel=1e-12)
    assert coefficients(4, 0.75, 4) == pytest.approx(
        [1.0] * T, rel=1e-12
    )  # the tail, too, is trained in full
    assert coefficients(4, 0.75, 4, tail="absorb")[-2:] == pytest.approx([0.5, 0.5], rel=1e-12)
    assert coefficients(5, 0.3, 5)[:5] == pytest.approx(
        [3.5, 0.375, 0.375, 0.375, 0.375], rel=1e-12
    )


@pytest.mark.parametrize("stride", [1, 3])
def test_padding_and_other_rows_change_nothing(stride):  # invariant 7
    given, weights = ratios(B, T), block_weights(3, 0.2)
    before = block_log_ratios(given, MASKS, weights, stride=stride)
    wider = torch.cat([given, torch.full((B, 4), 7.0)], 1)
    mask = torch.cat([MASKS, torch.zeros(B, 4, dtype=torch.bool)], 1)
    order = [3, 0, 4, 2, 1]
    after = block_log_ratios(wider[order], mask[order], weights, stride=stride)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[order], other[:, :T])
        assert (other[:, T:] == 0).all()


def test_a_gap_stops_the_window():  # invariant 7
    given = torch.tensor([[0.1, 0.2, 99.0, 0.4, 0.5]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, True]])
    values, _, _ = block_log_ratios(given, mask, torch.ones(3))
    assert values[0].tolist() == pytest.approx([0.3, 0.2, 0.0, 0.9, 0.5], rel=1e-12)


def test_masked_values_are_never_read():
    for shape in ((B, T), (B, T, 3)):
        clean, dirty = ratios(*shape), ratios(*shape)
        alive = (
            MASKS
            if len(shape) == 2
            else torch.stack(
                [
                    MASKS
                    & torch.stack(
                        [MASKS[:, t : t + i + 1].all(1) & (t + i < T) for t in range(T)], 1
                    )
                    for i in range(3)
                ],
                -1,
            )
        )
        dirty[~alive] = torch.nan
        leaves = [x.requires_grad_() for x in (clean, dirty)]
        grads = []
        for leaf in leaves:
            value = block_log_ratios(leaf, MASKS, block_weights(3, 0.2))[0]
            value.exp().sum().backward()
            grads.append((value.detach(), leaf.grad))
        for one, other in zip(*grads, strict=True):
            assert torch.equal(one, other)


def test_gradients_reach_every_token_of_an_action():
    given = ratios(B, T).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_log_ratios(x, MASKS)[0], given)
    assert torch.autograd.gradcheck(
        lambda x: segment_log_ratios(x, MASKS, torch.arange(T).expand(B, T) // 3)[0], given
    )
    assert torch.autograd.gradcheck(
        lambda x: block_log_ratios(x, MASKS, block_weights(3, 0.4), stride=3)[0], given
    )


def test_weights_of_blocks():
    assert block_weights(5, 0.3).tolist() == pytest.approx(
        [0.7, 0.075, 0.075, 0.075, 0.075], rel=1e-12
    )
    assert block_weights(1, 0.3).tolist() == [1.0]
    assert geometric_weights(3, 0.5).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7], rel=1e-12)
    assert geometric_weights(4, 1.0).tolist() == pytest.approx([0.25] * 4, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: block_weights(0, 0.2), "`n` must be at least 1, got 0"),
        (lambda: block_weights(3, 1.2), r"`future_share` must be in \[0, 1\], got 1.2"),
        (lambda: geometric_weights(3, 0.0), "`decay` must be above 0, got 0.0"),
        (
            lambda: block_log_ratios(ratios(B, T), MASKS, torch.ones(3), stride=4),
            "`stride` must be between 1 and .* 3, got 4",
        ),
        (
            lambda: block_log_ratios(ratios(B, T), MASKS, torch.ones(3), tail="x"),
            "`tail` must be .*, got 'x'",
        ),
        (
            lambda: block_log_ratios(ratios(B, T, 2), MASKS, torch.ones(3)),
            r"`log_ratios_BTN` must have shape \[B=5, T=10, N=3\]",
        ),
        (
            lambda: block_log_ratios(ratios(B, 4), MASKS, torch.ones(3)),
            r"`log_ratios_BT` must have shape \[B=5, T=10\]",
        ),
        (
            lambda: sequence_log_ratios(ratios(B, 4), MASKS),
            r"`mask_BT` must have shape \[B=5, T=4\]",
        ),
        (
            lambda: segment_log_ratios(ratios(B, T), MASKS, torch.full((B, T), T)),
            r"`segments_BT` must be in \[0, 10\).* got 10",
        ),
        (
            lambda: segment_log_ratios(ratios(B, T), MASKS, torch.full((B, T), -1)),
            r"`segments_BT` must be in .* got -1",
        ),
    ],
)
def test_messages_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
