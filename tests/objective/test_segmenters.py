"""Delimiters and entropies cut a response into blocks, as loops over tokens do."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import ActionSpace, SegmentActions
from lightning_mpo.objective.segmenters import DelimiterSegmenter, EntropySegmenter
from lightning_mpo.types import take_rows
from tests.support.builders import seeded
from tests.support.segments import (
    GAPS,
    LINES,
    Thirds,
    cut,
    naive_delimiters,
    random_rollout,
    rollout_of,
)

# --- delimiters -----------------------------------------------------------------------------------------------------


def test_a_block_ends_with_the_token_that_contains_a_delimiter():
    rollout = rollout_of(torch.tensor([[0, 2, 1, 3, 3, 0, 1]]))
    assert cut(DelimiterSegmenter(), rollout, texts=LINES) == [[[0, 1], [2, 3], [4], [5, 6]]]
    assert cut(DelimiterSegmenter([". "]), rollout_of(torch.tensor([[0, 5, 1]])), texts=LINES) == [
        [[0, 1], [2]]
    ]
    assert cut(
        DelimiterSegmenter(["=", "+"]), rollout_of(torch.tensor([[0, 4, 6, 1]])), texts=LINES
    ) == [[[0, 1], [2], [3]]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("delimiters", [["\n"], ["=", "+", "€"], ["a", ". "]])
@pytest.mark.parametrize("max_length", [None, 1, 2])
def test_delimiters_cut_as_a_loop_does(seed, delimiters, max_length):
    rollout = random_rollout(seed)
    found = cut(DelimiterSegmenter(delimiters), rollout, texts=LINES, max_length=max_length)
    assert found == naive_delimiters(rollout, delimiters, max_length)


def test_the_table_over_the_vocabulary_is_made_once_and_anew_for_another_vocabulary():
    segmenter, rollout = DelimiterSegmenter(), rollout_of(torch.tensor([[0, 1, 2, 0]]))
    assert segmenter.ends(LINES) is segmenter.ends(LINES)
    assert cut(segmenter, rollout, texts=LINES) == [[[0, 1, 2], [3]]]
    assert cut(segmenter, rollout, texts=["a", "\n", "b", "c", "d", "e", "f"]) == [[[0, 1], [2, 3]]]


def test_a_vocabulary_without_delimiters_is_refused_beforehand():
    SegmentActions(DelimiterSegmenter()).check(LINES)
    SegmentActions(EntropySegmenter(0.5)).check(())
    with pytest.raises(UserError, match="no token of the vocabulary"):
        SegmentActions(DelimiterSegmenter()).check(["a", "b"])


def test_delimiters_that_no_token_contains_are_refused_only_when_all_are():
    rollout = random_rollout()
    assert cut(DelimiterSegmenter(["\n", "€"]), rollout, texts=LINES) == cut(
        DelimiterSegmenter(["\n"]), rollout, texts=LINES
    )
    segmenter, texts = DelimiterSegmenter([". T", "\n€"]), ["a", ".", " T"]
    for _ in range(2):  # the second time from the table
        with pytest.raises(
            UserError, match=r"no token .* `DelimiterSegmenter.delimiters` \('\. T', '\\n€'\)"
        ) as error:
            cut(segmenter, rollout, texts=texts)
        assert "\n" not in str(error.value)


# --- entropy --------------------------------------------------------------------------------------------------------


def naive_entropy(entropy: Tensor, mask: Tensor, starts) -> list[list[list[int]]]:
    rows = []
    for b in range(len(mask)):
        found: list[list[int]] = []
        kept = entropy[b][mask[b]]
        for t in mask[b].nonzero()[:, 0].tolist():
            if not found or t - 1 not in found[-1] or starts(entropy[b, t], kept):
                found.append([])
            found[-1].append(t)
        rows.append(found)
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_entropy_cuts_as_a_loop_does(seed):
    rollout = random_rollout(seed)
    entropy = torch.rand(GAPS.shape, generator=seeded(seed + 50), dtype=torch.float64)
    found = cut(EntropySegmenter(threshold=0.6), rollout, entropy)
    assert found == naive_entropy(entropy, GAPS, lambda h, kept: h >= 0.6)
    found = cut(EntropySegmenter(quantile=0.7), rollout, entropy)
    assert found == naive_entropy(entropy, GAPS, lambda h, kept: h > kept.quantile(0.7))


def test_a_threshold_cuts_at_it_and_a_quantile_above_it():
    rollout, entropy = (
        rollout_of(torch.zeros(1, 5, dtype=torch.int64)),
        torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.25]]),
    )
    assert cut(EntropySegmenter(threshold=0.5), rollout, entropy) == [[[0, 1], [2, 3, 4]]]
    assert cut(EntropySegmenter(threshold=0.51), rollout, entropy) == [[[0, 1, 2, 3, 4]]]
    assert cut(EntropySegmenter(quantile=0.5), rollout, entropy) == [[[0, 1], [2, 3, 4]]]
    assert cut(EntropySegmenter(quantile=0.49), rollout, entropy) == [[[0, 1], [2, 3], [4]]]


def test_a_quantile_is_of_one_response():
    """Rows on other processes, or in another order, move no block."""
    entropy = torch.rand(GAPS.shape, generator=seeded(1))
    rollout, scaled = random_rollout(), entropy * torch.tensor([[1.0], [10.0], [1.0], [0.1]])
    whole = cut(EntropySegmenter(quantile=0.6), rollout, scaled)
    assert whole == cut(EntropySegmenter(quantile=0.6), rollout, entropy)
    parts = [
        cut(EntropySegmenter(quantile=0.6), take_rows(rollout, torch.tensor([b])), entropy[[b]])
        for b in range(4)
    ]
    assert whole == [part[0] for part in parts]


def test_what_is_asked_of_the_policy_follows_the_segmenter():
    for segmenter, entropy, texts in [
        (DelimiterSegmenter(), False, True),
        (EntropySegmenter(quantile=0.5), True, False),
        (Thirds(), False, False),
    ]:
        space: ActionSpace = SegmentActions(segmenter)
        assert (space.needs_entropy, space.needs_texts) == (entropy, texts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DelimiterSegmenter([]),
            "`DelimiterSegmenter.delimiters` must be a list of texts, .* got []",
        ),
        (lambda: DelimiterSegmenter(["\n", ""]), r"none of them empty, got ['\n', '']"),
        (lambda: DelimiterSegmenter("\n."), "must be a list of texts"),
        (lambda: DelimiterSegmenter([1]), "must be a list of texts"),  # type: ignore[list-item]
        (
            lambda: EntropySegmenter(),
            "either `threshold` (nats) or `quantile`, got threshold=None and quantile=None",
        ),
        (lambda: EntropySegmenter(0.5, 0.5), "either `threshold` (nats) or `quantile`"),
        (
            lambda: EntropySegmenter(threshold=0.0),
            "`EntropySegmenter.threshold` must be positive, got 0.0",
        ),
        (lambda: EntropySegmenter(threshold=float("nan")), "`EntropySegmenter.threshold`"),
        (
            lambda: EntropySegmenter(quantile=1.0),
            "`EntropySegmenter.quantile` must be in [0, 1), got 1.0",
        ),
        (lambda: EntropySegmenter(quantile=-0.1), "`EntropySegmenter.quantile`"),
        (
            lambda: SegmentActions(Thirds(), "product"),
            "`SegmentActions.ratio` must be 'mean' or 'joint', got 'product'",
        ),  # type: ignore[arg-type]
        (
            lambda: SegmentActions(Thirds(), max_length=0),
            "`SegmentActions.max_length` must be at least 1, got 0",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=re.escape(message).replace(r"\.\*", ".*")):
        make()


@pytest.mark.parametrize(
    "space",
    [SegmentActions(EntropySegmenter(0.5)), SegmentActions(Thirds())],
    ids=["entropy", "own"],
)
def test_what_the_loop_must_pass_is_asked_for(space):
    with pytest.raises(RuntimeError, match="needs"):
        space.action_log_ratios(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), None)
    if space.needs_entropy:
        with pytest.raises(RuntimeError, match="`EntropySegmenter` needs `entropy_BT`"):
            space.segment(random_rollout(), None, ())
