"""Laws of every action space: which tokens share an importance ratio."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import (
    ActionSpace,
    BlockActions,
    BlockWeights,
    ExplicitWeights,
    FutureShare,
    GeometricDecay,
    SegmentActions,
    SequenceActions,
    TokenActions,
)
from lightning_mpo.objective.segmenters import DelimiterSegmenter, EntropySegmenter
from lightning_mpo.types import Rollout
from tests.support.builders import VOCABULARY, right_padded, seeded, subclasses

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
]
WEIGHTS: list[BlockWeights] = [
    FutureShare(0.0),
    FutureShare(0.3),
    GeometricDecay(0.5),
    GeometricDecay(1.0),
]


def name(space: ActionSpace) -> str:
    return f"{type(space).__name__}{list(vars(space).values())}".replace(" ", "")


each = pytest.mark.parametrize("space", SPACES, ids=name)
PLAIN = right_padded([7, 1, 0, 4, 8, 3], 9)
GAPS = torch.tensor(
    [
        [1, 1, 1, 0, 1, 1, 1, 1, 0],
        [0, 1, 0, 1, 1, 0, 0, 1, 1],
        [0] * 9,
        [1] * 9,
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
    ]
).bool()
each_mask = pytest.mark.parametrize("mask", [PLAIN, GAPS], ids=["plain", "gaps"])


def ratios(mask: Tensor, seed: int = 0, garbage: float = 0.0) -> Tensor:
    values = 0.3 * torch.randn(mask.shape, generator=seeded(seed), dtype=torch.float64)
    return torch.where(mask, values, garbage)


def segments(space: ActionSpace, mask: Tensor, rows: Tensor | None = None) -> Tensor | None:
    """Let the space number its actions over random tokens and entropies, the same for a row whatever its width."""
    B, T = mask.shape
    rows = torch.arange(B) if rows is None else rows
    ids = torch.randint(0, VOCABULARY, (16, 16), generator=seeded(8))[rows, :T]
    entropy = torch.rand(16, 16, generator=seeded(9))[rows, :T]
    rollout = Rollout(ids, mask, mask, torch.arange(B), torch.zeros(B, T), torch.zeros(B))
    texts = [f"{i}\n" if i % 4 == 0 else str(i) for i in range(VOCABULARY)]
    return space.segment(
        rollout, entropy if space.needs_entropy else None, texts if space.needs_texts else ()
    )


def group(
    space: ActionSpace, values: Tensor, mask: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    log_ratios, starts, weights = space.group(values, mask, segments(space, mask, rows))
    return torch.where(starts, log_ratios, 0), starts, weights


def test_the_lists_have_every_member():
    assert subclasses(ActionSpace) == {type(space) for space in SPACES}
    assert subclasses(BlockWeights) == {type(weights) for weights in WEIGHTS} | {ExplicitWeights}


@each
@each_mask
def test_weights_count_the_tokens_of_each_row(space, mask):
    _, starts, weights = group(space, ratios(mask), mask)
    assert weights.sum(1).tolist() == mask.sum(1).tolist()
    assert ((weights > 0) == starts).all()
    assert torch.equal(space.weights(mask, segments(space, mask)).double(), weights.double())


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


def test_only_token_actions_are_token_level():
    assert [type(space) for space in SPACES if space.token_level] == [TokenActions]


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
