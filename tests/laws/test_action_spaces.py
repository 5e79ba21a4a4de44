"""Laws of every action space: which tokens share an importance ratio."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from lightning_mpo.objective.action_spaces import (
    ActionSpace,
    SegmentActions,
    SequenceActions,
    TokenActions,
)
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import (
    BlockWeights,
    ExplicitWeights,
    FutureShare,
    GeometricDecay,
)
from lightning_mpo.objective.segmenters import DelimiterSegmenter, EntropySegmenter
from lightning_mpo.objective.trace_actions import ForwardTraceActions, PrefixActions
from tests.support.action_spaces import GAPS, WEIGHTS, each_mask, group, name, ratios, segments
from tests.support.builders import seeded, subclasses

SPACES: list[ActionSpace] = [
    TokenActions(),
    BlockActions(FutureShare(0.2), length=1),
    BlockActions(FutureShare(0.2), length=3),
    BlockActions(FutureShare(0.4), length=3, tail="renorm"),
    BlockActions(GeometricDecay(0.5), length=5),
    BlockActions(GeometricDecay(1.0), length=3, stride=3),
    BlockActions(GeometricDecay(0.7), length=4, stride=4, tail="absorb"),
    BlockActions(ExplicitWeights([1.0, 1.0]), length=2, tail="absorb", ratio="joint"),
    SequenceActions(mean=True),
    SequenceActions(mean=False),
    SegmentActions(DelimiterSegmenter()),
    SegmentActions(DelimiterSegmenter(), ratio="joint", max_length=2),
    SegmentActions(EntropySegmenter(threshold=0.7)),
    SegmentActions(EntropySegmenter(quantile=0.6), ratio="joint"),
    *(PrefixActions(), PrefixActions(mean=True), ForwardTraceActions(1), ForwardTraceActions(3)),
]
each = pytest.mark.parametrize("space", SPACES, ids=name)


def test_the_lists_have_every_member():
    assert subclasses(ActionSpace) == {type(space) for space in SPACES}
    assert subclasses(BlockWeights) == {type(weights) for weights in WEIGHTS} | {ExplicitWeights}


@each
@each_mask
def test_weights_count_the_tokens_of_each_row(space, mask):
    _, starts, weights = group(space, ratios(mask), mask)
    assert weights.sum(1).tolist() == mask.sum(1).tolist()
    assert ((weights > 0) == starts).all()
    assert torch.equal(space.token_counts(mask, segments(space, mask)).double(), weights.double())


@each
@each_mask
def test_actions_start_inside_the_mask_and_rows_without_tokens_have_none(space, mask):
    starts = group(space, ratios(mask), mask)[1]
    assert starts.dtype == torch.bool
    assert not (starts & ~mask).any()
    assert starts.any(1).tolist() == mask.any(1).tolist()


@each
@each_mask
def test_the_first_token_of_a_row_starts_an_action(space, mask):
    starts = group(space, ratios(mask), mask)[1]
    for b in range(len(mask)):
        if mask[b].any():
            assert starts[b, int(mask[b].int().argmax())]


@each
@each_mask
def test_on_policy_log_ratios_are_zero(space, mask):
    assert (group(space, torch.zeros(mask.shape), mask)[0] == 0).all()


@each
@each_mask
def test_columns_outside_the_mask_and_other_rows_change_nothing(space, mask):
    values = ratios(mask)
    expected = group(space, values, mask)
    wide_mask = pad(torch.cat([mask, ~mask]), (0, 3), value=False)
    wide_values = torch.where(
        wide_mask, pad(torch.cat([values, values + 1]), (0, 3)), 7.0
    )  # garbage where masked
    B, T = mask.shape
    for part, wide in zip(expected, group(space, wide_values, wide_mask), strict=True):
        torch.testing.assert_close(wide[:B, :T], part, rtol=0, atol=1e-12)
        assert not wide[:B, T:].any()


@each
@each_mask
def test_rows_are_independent_of_their_order(space, mask):
    order = torch.randperm(len(mask), generator=seeded(5))
    values = ratios(mask)
    moved_rows = group(space, values[order], mask[order], order)
    for part, moved in zip(group(space, values, mask), moved_rows, strict=True):
        torch.testing.assert_close(moved, part[order], rtol=0, atol=1e-12)


@each
@each_mask
def test_the_gradient_reaches_tokens_of_the_mask_and_every_action_the_token_it_starts_at(
    space, mask
):
    values = ratios(mask, garbage=5.0).requires_grad_()
    log_ratios, starts, _ = group(space, values, mask)
    (everywhere,) = torch.autograd.grad(log_ratios.sum(), values, retain_graph=True)
    assert not everywhere[~mask].any()
    for b, u in starts.nonzero().tolist():
        (gradient,) = torch.autograd.grad(log_ratios[b, u], values, retain_graph=True)
        assert gradient[b, u] > 0
        assert not gradient[torch.arange(len(mask)) != b].any()
        assert not gradient[b, :u].any()  # an action stands at its first token


@pytest.mark.parametrize(
    "space", [s for s in SPACES if not isinstance(s, SequenceActions)], ids=name
)
def test_windows_end_at_a_gap(space):
    """docs/algorithms.md 16.1, invariant 7. Sequences go on behind it; they have no windows."""
    values = ratios(GAPS).requires_grad_()
    log_ratios, starts, _ = group(space, values, GAPS)
    for b, u in starts.nonzero().tolist():
        (gradient,) = torch.autograd.grad(log_ratios[b, u], values, retain_graph=True)
        end = u
        while end < GAPS.shape[1] and GAPS[b, end]:
            end += 1
        assert not gradient[b, end:].any()


@each
@each_mask
def test_actions_take_the_advantage_of_their_first_token(space, mask):
    advantages = torch.randn(mask.shape, generator=seeded(8), dtype=torch.float64)
    values = ratios(mask)
    actions = space.actions(values, advantages, mask, segments(space, mask))
    assert torch.equal(actions.advantages_BU[actions.mask_BU], advantages[actions.mask_BU])
    expected = group(space, values, mask)
    torch.testing.assert_close(
        torch.where(actions.mask_BU, actions.log_ratios_BU, 0), expected[0], rtol=0, atol=0
    )
    assert torch.equal(actions.mask_BU, expected[1])
    assert torch.equal(actions.weights_BU.double(), expected[2].double())


@each
@each_mask
def test_factors_of_losses_are_positive_without_gradient_and_one_on_policy(space, mask):
    numbers = segments(space, mask)
    values = ratios(mask, garbage=5.0).requires_grad_()
    factors = space.actions(values, values, mask, numbers).factors_BU
    if factors is None:
        return
    assert not factors.requires_grad
    assert (factors > 0).all()
    assert (factors[~mask] == 1).all()
    at_rest = torch.zeros(mask.shape)
    assert (space.actions(at_rest, at_rest, mask, numbers).factors_BU == 1).all()


def test_only_actions_of_one_token_are_token_level():
    kinds = {type(space) for space in SPACES if space.token_level}
    assert kinds == {TokenActions, ForwardTraceActions}
