"""Joined rollouts hold the rows of their parts, whatever the widths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.rollout import join_rollouts
from lightning_mpo.types import PromptRow, Rollout, take_rows
from tests.support.builders import make_rollout

SHAPES = [([3, 6], [4, 1, 5, 2], 4), ([2], [9, 3], 7), ([8, 1, 1], [1, 2, 3, 1, 1, 2], 2)]
"""Prompt lengths, response lengths and support sizes of the parts."""


def part(number: int, *, support: bool = True, slots: bool = True, **fields) -> Rollout:
    prompts, responses, size = SHAPES[number]
    rollout = make_rollout(
        prompts, responses, support=size if support else None, slots=support and slots, seed=number
    )
    B, T = rollout.response_mask_BT.shape
    g = torch.Generator().manual_seed(number)
    return replace(
        rollout,
        **{
            "behaviour_logprobs_BT": torch.randn(B, T, generator=g) * rollout.response_mask_BT,
            "kept_mass_BT": torch.rand(B, T, generator=g) if support else None,
            "finish_B": torch.randint(2, (B,), generator=g),
            "texts": tuple(f"{number}.{b}" for b in range(B)),
            "rows": tuple(PromptRow(f"{number}.{b}", "") for b in range(B)),
        }
        | fields,
    )


def ids(rollout: Rollout, b: int, t: int) -> list[int]:
    """Return the support of a step, slots that hold nothing left out."""
    assert rollout.support_BTK is not None
    support = rollout.support_BTK[b, t]
    return (
        support if rollout.support_mask_BTK is None else support[rollout.support_mask_BTK[b, t]]
    ).tolist()


def line(rollout: Rollout, b: int) -> dict[str, object]:
    """Say all that a row holds, without padding."""
    S, mask = rollout.prompt_length, rollout.response_mask_BT[b]

    def masked(values: Tensor | None) -> list | None:
        return None if values is None else values[b][mask].tolist()

    return {
        "prompt": rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]].tolist(),
        "response": rollout.responses_BT[b][mask].tolist(),
        "attended": rollout.attention_mask_BL[b].sum().item(),
        "logprobs": masked(rollout.behaviour_logprobs_BT),
        "kept": masked(rollout.kept_mass_BT),
        "outside": masked(rollout.outside_BT),
        "finish": rollout.finish_B[b].item(),
        "supports": [ids(rollout, b, t) for t in mask.nonzero()[:, 0].tolist()]
        if rollout.support_BTK is not None
        else None,
        "text": rollout.texts[b],
        "row": rollout.rows[b].prompt,
    }


def lines(*rollouts: Rollout) -> list[dict[str, object]]:
    return [line(rollout, b) for rollout in rollouts for b in range(len(rollout.group_B))]


@pytest.mark.parametrize("support", [True, False], ids=["supports", "full"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,), (0, 0)], ids=str)
def test_every_row_is_as_it_was(order, support):
    parts = [part(number, support=support) for number in order]
    joined = join_rollouts(parts)
    assert lines(joined) == lines(*parts)
    S, T = max(p.prompt_length for p in parts), max(p.response_mask_BT.shape[1] for p in parts)
    assert joined.tokens_BL.shape == (sum(len(p.group_B) for p in parts), S + T)
    assert joined.tokens_BL.dtype == torch.int64


def test_padding_stands_where_it_belongs():
    joined = join_rollouts([part(0), part(1), part(2)])
    S = joined.prompt_length
    prompt, response = joined.attention_mask_BL[:, :S], joined.response_mask_BT
    assert not (prompt[:, :-1] & ~prompt[:, 1:]).any(), "prompts end at S"
    assert not (response[:, 1:] & ~response[:, :-1]).any(), "responses begin at S"
    assert torch.equal(joined.attention_mask_BL[:, S:], response)
    assert not joined.support_mask_BTK[4:6, 4:, 7:].any(), "no slot where there was none"
    assert joined.kept_mass_BT[~response].min() >= 0
    assert joined.kept_mass_BT[0, -1] == 1


def test_groups_are_numbered_anew_and_stay_apart():
    parts = [replace(part(0), group_B=torch.tensor([7, 7, 2, 2])), part(1), part(2)]
    groups = join_rollouts(parts).group_B.tolist()
    assert [groups[0] == groups[1], groups[2] == groups[3], groups[1] == groups[2]] == [
        True,
        True,
        False,
    ]
    assert groups[4:] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert sorted(set(groups)) == list(range(6))


@pytest.mark.parametrize("with_slots", [(False, False), (True, False), (False, True)], ids=str)
def test_supports_of_one_size_need_slots_only_where_a_part_has_them(with_slots):
    parts = [
        replace(part(0, slots=slots), texts=(f"{i}",) * 4) for i, slots in enumerate(with_slots)
    ]
    joined = join_rollouts(parts)
    assert (joined.support_mask_BTK is not None) == any(with_slots)
    assert lines(joined) == lines(*parts)


def test_supports_of_two_sizes_get_slots():
    parts = [part(0, slots=False), part(1, slots=False)]
    joined = join_rollouts(parts)
    assert lines(joined) == lines(*parts)
    assert (
        joined.support_mask_BTK.sum() == 4 * 5 * 4 + 2 * 9 * 7
    )  # rows x columns x slots of each part


def test_tokens_outside_their_support_stay_marked():
    first, second = part(0), part(1)
    marked = first.response_mask_BT & (torch.arange(first.response_mask_BT.shape[1]) == 1)
    joined = join_rollouts([second, replace(first, outside_BT=marked)])
    assert joined.outside_BT.sum() == marked.sum() > 0
    assert torch.equal(joined.outside_BT[2:, : marked.shape[1]], marked)


def test_one_part_is_itself():
    whole = part(0)
    joined = join_rollouts([whole])
    for name, value in vars(whole).items():
        same = (
            torch.equal(getattr(joined, name), value)
            if isinstance(value, Tensor)
            else getattr(joined, name) == value
        )
        assert same, name


def test_what_was_split_is_joined_to_what_it_was():
    whole = part(2)
    pieces = [take_rows(whole, torch.tensor(rows), texts=True) for rows in ([0, 1], [2, 3], [4, 5])]
    assert lines(join_rollouts(pieces)) == lines(whole)
    assert torch.equal(join_rollouts(pieces).group_B, whole.group_B)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one rollout"),
        ([part(0), part(1, support=False)], "agree on `support_BTK`"),
        ([part(0), part(1, kept_mass_BT=None)], "agree on `kept_mass_BT`"),
        ([part(0), part(1, texts=())], "agree on `texts`"),
        ([part(0, rows=()), part(1)], "agree on `rows`"),
    ],
    ids=["none", "supports", "mass", "texts", "rows"],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        join_rollouts(parts)


def test_candidates_keep_their_own_number_of_slots():
    """They are as many in every part, whatever the width of the supports."""
    parts = [make_rollout([3], [4, 2], support=k) for k in (3, 5)]
    parts = [
        replace(
            part,
            candidates_BTK=torch.full((2, 4, 2), 7, dtype=torch.int32),
            candidate_logprobs_BTK=torch.full((2, 4, 2), -float(k)),
        )
        for k, part in enumerate(parts, 1)
    ]
    joined = join_rollouts(parts)
    assert joined.support_BTK.shape == (4, 4, 5)
    assert joined.candidates_BTK.shape == joined.candidate_logprobs_BTK.shape == (4, 4, 2)
    assert joined.candidate_logprobs_BTK[:, 0, 0].tolist() == [-1.0, -1.0, -2.0, -2.0]
