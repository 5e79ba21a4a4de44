"""A segmenter of a user, and blocks of unequal length on the way to the loss."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import replace

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_mpo.cli.classes import classes
from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import ActionSpace, SegmentActions
from lightning_mpo.objective.segmenters import (
    DelimiterSegmenter,
    EntropySegmenter,
    Segmenter,
    check_segments,
)
from lightning_mpo.types import Experience, take_rows, trim
from tests.support.builders import make_experience, right_padded, seeded, subclasses
from tests.support.segments import (
    GAPS,
    LINES,
    Thirds,
    cut,
    naive_delimiters,
    random_rollout,
    rollout_of,
)


class Returns(Segmenter):
    """A mistake of the user's, as it is given."""

    def __init__(self, given: object) -> None:
        self.given = given

    def segment(self, rollout, entropy_BT, texts):
        return self.given


# --- one's own ------------------------------------------------------------------------------------------------------


def test_the_example_in_the_docstring_works():
    code = textwrap.dedent(inspect.getdoc(Segmenter).split("::\n", 1)[1])
    names: dict = {"__name__": "example"}
    exec(code, names)
    texts = ["a", " Then", "B", "c"]
    rollout = rollout_of(torch.tensor([[1, 0, 2, 3, 0], [0, 3, 1, 1, 0]]))
    found = cut(names["Capitals"](), rollout, texts=texts)
    assert SegmentActions(names["Capitals"]()).needs_texts
    assert found == [[[0, 1], [2, 3, 4]], [[0, 1], [2], [3, 4]]]


def test_segmenters_are_named_in_a_configuration():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--actions", type=ActionSpace)

    def build(segmenter):
        options = {
            "class_path": "SegmentActions",
            "init_args": {"segmenter": segmenter, "max_length": 4},
        }
        return parser.instantiate_classes(parser.parse_object({"actions": options})).actions

    assert isinstance(build("tests.support.segments.Thirds").segmenter, Thirds)
    lines = build({"class_path": "DelimiterSegmenter", "init_args": {"delimiters": ["\n", "."]}})
    assert lines.segmenter.delimiters == ("\n", ".")
    assert lines.max_length == 4
    assert repr(lines.segmenter) == "DelimiterSegmenter(delimiters=('\\n', '.'))"
    assert (
        build({"class_path": "EntropySegmenter", "init_args": {"quantile": 0.8}}).segmenter.quantile
        == 0.8
    )
    assert {"DelimiterSegmenter", "EntropySegmenter", "Segmenter"} - set(classes()) == {"Segmenter"}
    assert subclasses(Segmenter) == {DelimiterSegmenter, EntropySegmenter}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            None,
            r"`Returns.segment` must return a tensor of integers of shape \[B=4, T=8\], .* got NoneType",
        ),
        (torch.zeros(4, 7, dtype=torch.int64), r"`Returns.segment` .*\[B=4, T=8\], got \[4, 7\]"),
        (torch.zeros(8, dtype=torch.int64), r"got \[8\]"),
        (
            torch.zeros(4, 8),
            "`Returns.segment` must return int64 numbers, one per block, got torch.float32",
        ),
        (GAPS, r"got bool; where True starts a block return `starts_BT.long\(\).cumsum\(1\)`"),
        (
            torch.tensor([[5, 5, 6, 6, 7, 7, 7, 7], [1, 2, 3, 4, 4, 5, 2, 5]] + [[0] * 8] * 2),
            r"`Returns.segment` gives token 6 of row 1 the number 2, which an earlier .* must be neighbours; give each",
        ),
    ],
)
def test_what_is_no_number_per_block_is_refused_by_name(given, message):
    with pytest.raises(UserError, match=message) as error:
        cut(Returns(given), random_rollout())
    assert "\n" not in str(error.value)


def test_numbers_outside_the_response_and_of_any_size_do_not_matter():
    given = torch.tensor(
        [
            [-9, -9, 10**12, 4, 4, 4, 4, -9],
            [0, 0, 1, 2, 0, 0, 3, 3],
            [1, 2] * 4,
            [1, 7, 7, 8, 7, 7, 1, 9],
        ]
    )
    check_segments(Thirds(), given, GAPS)
    check_segments(Thirds(), given.clamp(max=99).int(), GAPS)
    assert cut(Returns(given), random_rollout()) == [
        [[0, 1], [2], [3, 4, 5, 6]],
        [[0, 1], [4, 5], [6, 7]],  # one number on both sides of a gap: two blocks
        [],
        [[1, 2], [4], [7]],
    ]


# --- on the way to the loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["mean", "joint"])
@pytest.mark.parametrize("max_length", [None, 2])
def test_the_ratio_of_a_segment_is_that_of_a_loop(ratio, max_length):
    rollout, values = (
        random_rollout(3),
        torch.randn(GAPS.shape, generator=seeded(2), dtype=torch.float64),
    )
    space = SegmentActions(DelimiterSegmenter(), ratio, max_length)
    numbers = space.segment(rollout, None, LINES)
    log_ratios, starts, weights = space.action_log_ratios(values, GAPS, numbers)
    expected = torch.zeros(GAPS.shape, dtype=torch.float64), torch.zeros(GAPS.shape)
    for b, row in enumerate(naive_delimiters(rollout, ["\n"], max_length)):
        for block in row:
            product = 1.0
            for t in block:
                product *= values[b, t].exp()
            expected[0][b, block[0]] = (
                product ** (1 / len(block)) if ratio == "mean" else product
            ).log()
            expected[1][b, block[0]] = len(block)
    torch.testing.assert_close(log_ratios, expected[0], rtol=0, atol=1e-12)
    assert torch.equal(weights.float(), expected[1])
    assert torch.equal(starts, expected[1] > 0)


def test_numbers_stay_in_range_when_micro_batches_are_cut_to_their_longest_row():
    mask = right_padded([2, 9, 3])
    batch: Experience = make_experience(mask, torch.zeros(mask.shape))
    space = SegmentActions(Returns(torch.arange(9).expand(3, 9) + 500))
    batch = replace(batch, segments_BT=space.segment(batch.rollout, None, ()))
    for rows in ([0], [0, 2], [1]):
        part = trim(take_rows(batch, torch.tensor(rows)))
        assert torch.equal(space.token_counts(part.mask_BT, part.segments_BT), part.mask_BT.float())


def test_tokens_that_are_not_selected_leave_their_segment():
    rollout, space = (
        rollout_of(torch.tensor([[0, 0, 2, 0, 0]])),
        SegmentActions(DelimiterSegmenter()),
    )
    selected = torch.tensor([[False, True, True, False, True]])
    numbers = space.segment(rollout, None, LINES)
    log_ratios, starts, weights = space.action_log_ratios(
        torch.tensor([[9.0, 1, 2, 9, 4]]), selected, numbers
    )
    assert log_ratios.tolist() == [[0, 1.5, 0, 0, 4]]
    assert (starts.sum(), weights.tolist()) == (2, [[0, 2, 0, 0, 1]])
