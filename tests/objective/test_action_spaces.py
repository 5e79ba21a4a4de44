"""Limiting cases of action spaces, weights within blocks, and arguments that are refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import (
    ActionSpace,
    SegmentActions,
    SequenceActions,
    TokenActions,
)
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import ExplicitWeights, FutureShare, GeometricDecay
from lightning_mpo.objective.segmenters import EntropySegmenter
from tests.support.action_spaces import GAPS, PLAIN, WEIGHTS, each_mask, group, name, ratios
from tests.support.builders import right_padded

# --- limiting cases -------------------------------------------------------------------------------------------------


def assert_same(one: ActionSpace, other: ActionSpace, mask: Tensor) -> None:
    values = ratios(mask)
    for a, b in zip(group(one, values, mask), group(other, values, mask), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1e-12)


@each_mask
@pytest.mark.parametrize(
    "space",
    [
        BlockActions(FutureShare(0.3), length=1),
        BlockActions(ExplicitWeights([1.0, 0.0, 0.0]), length=3),
        BlockActions(FutureShare(0.0), length=4, tail="renorm"),
    ],
    ids=name,
)
def test_blocks_without_a_future_are_tokens(space, mask):
    assert_same(space, TokenActions(), mask)


@pytest.mark.parametrize("mean", [True, False])
def test_sequences_of_one_token_are_tokens(mean):
    assert_same(SequenceActions(mean), TokenActions(), right_padded([1, 0, 1, 1], 4))


def test_a_disjoint_block_longer_than_the_response_is_the_sequence():
    N = PLAIN.shape[1]
    assert_same(
        BlockActions(GeometricDecay(1.0), length=N, stride=N), SequenceActions(mean=True), PLAIN
    )
    product = BlockActions(
        ExplicitWeights([1.0] * N), length=N, stride=N, tail="absorb", ratio="joint"
    )
    assert_same(product, SequenceActions(mean=False), PLAIN)


@each_mask
@pytest.mark.parametrize("N", [1, 3])
def test_segments_without_a_cut_are_disjoint_blocks_of_their_greatest_length(mask, N):
    never = EntropySegmenter(threshold=1e9)
    mean = BlockActions(GeometricDecay(1.0), length=N, stride=N, tail="renorm")
    assert_same(SegmentActions(never, max_length=N), mean, mask)
    joint = BlockActions(
        ExplicitWeights([1.0] * N), length=N, stride=N, tail="absorb", ratio="joint"
    )
    assert_same(SegmentActions(never, ratio="joint", max_length=N), joint, mask)


def test_a_response_without_a_cut_is_a_sequence():
    never = EntropySegmenter(threshold=1e9)
    assert_same(SegmentActions(never), SequenceActions(mean=True), PLAIN)
    assert_same(SegmentActions(never, ratio="joint"), SequenceActions(mean=False), PLAIN)
    assert_same(
        SegmentActions(EntropySegmenter(threshold=1e-12), ratio="joint"), TokenActions(), GAPS
    )


def test_equal_log_ratios_give_that_ratio_to_every_full_window():
    """docs/algorithms.md 16.1, invariant 3."""
    mask = right_padded([8])
    for weights in WEIGHTS:
        log_ratios = group(BlockActions(weights, length=3), torch.full((1, 8), 0.7).double(), mask)[
            0
        ]
        torch.testing.assert_close(log_ratios[0, :6], torch.full((6,), 0.7).double())


def test_a_block_by_hand():
    """beta = (0.8, 0.1, 0.1) over log-ratios (1, 2, 3, 4); windows 1-2-3, 2-3-4, 3-4, 4."""
    values, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double(), right_padded([4])
    absorb = group(BlockActions(FutureShare(0.2), length=3), values, mask)[0]
    torch.testing.assert_close(absorb, torch.tensor([[1.3, 2.3, 2.8, 3.2]]).double())
    renorm = group(BlockActions(FutureShare(0.2), length=3, tail="renorm"), values, mask)[0]
    torch.testing.assert_close(renorm, torch.tensor([[1.3, 2.3, 2.8 / 0.9, 4.0]]).double())
    disjoint, starts, weights = group(
        BlockActions(FutureShare(0.2), length=3, stride=3), values, mask
    )
    torch.testing.assert_close(disjoint, torch.tensor([[1.3, 0.0, 0.0, 4.0]]).double())
    assert starts.tolist() == [[True, False, False, True]]
    assert weights.tolist() == [[3, 0, 0, 1]]


def test_a_sequence_by_hand():
    values, mask = (
        torch.tensor([[1.0, 2.0, 9.0, 4.0]]).double(),
        torch.tensor([[True, True, False, True]]),
    )
    assert group(SequenceActions(), values, mask)[0].tolist() == [[pytest.approx(7 / 3), 0, 0, 0]]
    assert group(SequenceActions(mean=False), values, mask)[0].tolist() == [[7, 0, 0, 0]]


# --- block weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", WEIGHTS, ids=lambda w: f"{type(w).__name__}{list(vars(w).values())}"
)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_block_weights_sum_to_one_and_do_not_grow(weights, length):
    values = weights.weights(length)
    assert len(values) == length
    assert sum(values) == pytest.approx(1)
    if not (isinstance(weights, FutureShare) and weights.share == 0):
        assert all(value > 0 for value in values)
    assert all(b <= a + 1e-12 for a, b in pairwise(values))


def test_block_weights_by_hand():
    assert FutureShare(0.3).weights(4) == pytest.approx([0.7, 0.1, 0.1, 0.1])
    assert GeometricDecay(0.5).weights(3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert ExplicitWeights([2.0, 1.0]).weights(2) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FutureShare(1.0), r"`FutureShare.share` must be in \[0, 1\), got 1.0"),
        (lambda: FutureShare(-0.1), "`FutureShare.share`"),
        (lambda: GeometricDecay(0.0), r"`GeometricDecay.decay` must be in \(0, 1\], got 0.0"),
        (lambda: GeometricDecay(1.1), "`GeometricDecay.decay`"),
        (lambda: ExplicitWeights([0.5, -0.1]), "`ExplicitWeights.values` must not be negative"),
        (lambda: ExplicitWeights([0.0, 0.0]), "not all 0"),
        (lambda: ExplicitWeights([]), "not all 0"),
        (
            lambda: BlockActions(ExplicitWeights([1.0, 1.0]), length=3),
            r"one weight per offset \(3\), got 2",
        ),
        (
            lambda: BlockActions(FutureShare(), length=0),
            "`BlockActions.length` must be at least 1, got 0",
        ),
        (
            lambda: BlockActions(FutureShare(), length=3, stride=2),
            "`BlockActions.stride` must be 1 or the block length 3",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()
