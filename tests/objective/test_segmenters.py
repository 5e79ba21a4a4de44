"""Where blocks of unequal length are cut, and what a segmenter of one's own may not return."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import replace

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lightning_mpo.cli.messages import _classes
from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import ActionSpace, SegmentActions
from lightning_mpo.objective.segmenters import (
    DelimiterSegmenter,
    EntropySegmenter,
    Segmenter,
    check_segments,
)
from lightning_mpo.types import Experience, Rollout, take_rows, trim
from tests.support.builders import make_experience, right_padded, seeded, subclasses

LINES = ["a", "b", "\n", ".\n", "x=", ". The", " +"]
GAPS = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1, 1, 1], [0] * 8, [0, 1, 1, 0, 1, 0, 0, 1]]
).bool()


class Thirds(Segmenter):
    """What a user might write: blocks of three columns."""

    def segment(self, rollout, entropy_BT, texts):
        return (torch.arange(rollout.response_mask_BT.shape[1]) // 3).expand(
            rollout.response_mask_BT.shape
        )


class Returns(Segmenter):
    """A mistake of the user's, as it is given."""

    def __init__(self, given: object) -> None:
        self.given = given

    def segment(self, rollout, entropy_BT, texts):
        return self.given


def rollout_of(ids_BT: Tensor, mask_BT: Tensor | None = None, prompt: int = 2) -> Rollout:
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT
    B, T = ids_BT.shape
    tokens = torch.cat([torch.full((B, prompt), 2), ids_BT], 1)  # prompts hold delimiters, too
    attention = torch.cat([torch.ones(B, prompt, dtype=torch.bool), mask_BT], 1)
    return Rollout(tokens, attention, mask_BT, torch.arange(B), torch.zeros(B, T), torch.zeros(B))


def blocks(numbers: Tensor, mask_BT: Tensor) -> list[list[list[int]]]:
    """Return the positions of each block, row by row."""
    rows: list[list[list[int]]] = []
    for b in range(len(numbers)):
        found: dict[int, list[int]] = {}
        for t in mask_BT[b].nonzero()[:, 0].tolist():
            found.setdefault(int(numbers[b, t]), []).append(t)
        rows.append(list(found.values()))
    return rows


def cut(
    segmenter: Segmenter, rollout: Rollout, entropy=None, texts=(), **options
) -> list[list[list[int]]]:
    numbers = SegmentActions(segmenter, **options).segment(rollout, entropy, texts)
    return blocks(numbers, rollout.response_mask_BT)


def random_rollout(seed: int = 0, vocabulary: int = len(LINES)) -> Rollout:
    ids = torch.randint(0, vocabulary, GAPS.shape, generator=seeded(seed))
    return rollout_of(ids, GAPS)


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


def naive_delimiters(
    rollout: Rollout, delimiters: list[str], max_length: int | None
) -> list[list[list[int]]]:
    rows = []
    for b in range(len(rollout.group_B)):
        found, ended = [], True
        for t in range(rollout.response_mask_BT.shape[1]):
            if not rollout.response_mask_BT[b, t]:
                ended = True
                continue
            if ended or len(found[-1]) == max_length:
                found.append([])
            found[-1].append(t)
            ended = any(d in LINES[rollout.responses_BT[b, t]] for d in delimiters)
        rows.append(found)
    return rows


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

    assert isinstance(build("tests.objective.test_segmenters.Thirds").segmenter, Thirds)
    lines = build({"class_path": "DelimiterSegmenter", "init_args": {"delimiters": ["\n", "."]}})
    assert lines.segmenter.delimiters == ("\n", ".")
    assert lines.max_length == 4
    assert repr(lines.segmenter) == "DelimiterSegmenter(delimiters=('\\n', '.'))"
    assert (
        build({"class_path": "EntropySegmenter", "init_args": {"quantile": 0.8}}).segmenter.quantile
        == 0.8
    )
    assert {"DelimiterSegmenter", "EntropySegmenter", "Segmenter"} - set(_classes()) == {
        "Segmenter"
    }
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
    log_ratios, starts, weights = space.group(values, GAPS, numbers)
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
        assert torch.equal(space.weights(part.mask_BT, part.segments_BT), part.mask_BT.float())


def test_tokens_that_are_not_selected_leave_their_segment():
    rollout, space = (
        rollout_of(torch.tensor([[0, 0, 2, 0, 0]])),
        SegmentActions(DelimiterSegmenter()),
    )
    selected = torch.tensor([[False, True, True, False, True]])
    numbers = space.segment(rollout, None, LINES)
    log_ratios, starts, weights = space.group(torch.tensor([[9.0, 1, 2, 9, 4]]), selected, numbers)
    assert log_ratios.tolist() == [[0, 1.5, 0, 0, 4]]
    assert (starts.sum(), weights.tolist()) == (2, [[0, 2, 0, 0, 1]])


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
        space.group(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), None)
    if space.needs_entropy:
        with pytest.raises(RuntimeError, match="`EntropySegmenter` needs `entropy_BT`"):
            space.segment(random_rollout(), None, ())
