"""Laying rows out in lines: what each token may see, where it stands, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies.packing import Lines, lay_out
from lightning_mpo.types import take_rows
from tests.support.builders import make_rollout

PROMPTS, RESPONSES = [6, 9, 4], [5, 1, 3, 2, 0, 7, 4, 4, 1]
ORDER = [3, 0, 8, 5, 1, 2, 7, 4, 6]


def lines(share: bool = True, hidden_size: int = 10_000, **options) -> tuple[Lines, object]:
    rollout = make_rollout(PROMPTS, RESPONSES, **options)
    return lay_out(rollout, share=share, hidden_size=hidden_size), rollout


def seen_by(packed: Lines, line: int, position: int) -> list[int]:
    """Return the positions of a line that one of its tokens attends to."""
    mask = packed.attention_mask()
    if mask is None:
        return list(range(position + 1))
    return mask[line, 0, position].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("order", [None, ORDER], ids=["sorted", "mixed"])
@pytest.mark.parametrize("share", [True, False])
def test_what_predicts_a_token_has_seen_its_prompt_and_response_before_it_in_order(share, order):
    packed, rollout = lines(share, order=order, left=2, right=1)
    S, L = rollout.prompt_length, packed.input_ids_RL.shape[1]
    for b in range(len(RESPONSES)):
        prompt = rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]].tolist()
        response = rollout.responses_BT[b][rollout.response_mask_BT[b]].tolist()
        for t in range(len(response)):
            line, position = divmod(int(packed.index_BT[b, t]), L)
            seen = seen_by(packed, line, position)
            places = packed.position_ids_RL[line, seen].tolist()
            tokens = packed.input_ids_RL[line, seen].tolist()
            assert [
                token for _, token in sorted(zip(places, tokens, strict=True))
            ] == prompt + response[:t]
            assert sorted(places) == list(range(len(prompt) + t))


def test_groups_share_a_line_and_rows_stand_alone_without_sharing():
    shared, rollout = lines(order=ORDER)
    assert shared.shared
    assert len(shared.input_ids_RL) == len(PROMPTS)
    prompts = rollout.attention_mask_BL[:, : rollout.prompt_length].sum(1)
    tokens = sum(PROMPTS) + sum(
        max(n - 1, 0) for n in RESPONSES
    )  # the last token of a response predicts nothing
    assert int((shared.segment_RL >= 0).sum()) == tokens
    alone, _ = lines(share=False, order=ORDER)
    assert not alone.shared
    assert alone.attention_mask() is None
    assert len(alone.input_ids_RL) == len(RESPONSES)
    assert int((alone.segment_RL >= 0).sum()) == int(prompts.sum()) + sum(
        max(n - 1, 0) for n in RESPONSES
    )


def test_padding_is_seen_by_nobody_and_every_token_sees_itself():
    packed, _ = lines()
    mask = packed.attention_mask()
    padding = packed.segment_RL < 0
    assert padding.any()
    real = ~padding
    assert not (mask[:, 0] & padding[:, None, :] & real[:, :, None]).any()
    assert (
        mask[:, 0].diagonal(dim1=1, dim2=2).all()
    )  # also padding, whose softmax would be empty otherwise


def test_lines_are_as_long_as_the_longest():
    packed, _ = lines()
    widths = [
        PROMPTS[g] + sum(max(n - 1, 0) for n in RESPONSES[3 * g : 3 * g + 3]) for g in range(3)
    ]
    assert packed.input_ids_RL.shape == (3, max(widths))


def test_sharing_is_done_where_it_costs_less():
    """A long prompt with short responses shares; a short prompt with long responses would only pay for attention."""
    long_prompt = make_rollout([60], [4, 4, 4])
    assert len(lay_out(long_prompt, share=True, hidden_size=8).input_ids_RL) == 1
    long_responses = make_rollout([4], [60, 60, 60])
    assert len(lay_out(long_responses, share=True, hidden_size=8).input_ids_RL) == 3
    assert len(lay_out(long_responses, share=True, hidden_size=10_000).input_ids_RL) == 1
    single = lay_out(take_rows(long_prompt, torch.tensor([1])), share=True, hidden_size=8)
    assert not single.shared


def test_a_group_may_be_cut_into_lines_of_about_equal_lengths():
    """Whole groups would pay for attention, and single rows for the prompt."""
    group = make_rollout([88], [170, 171, 172, 173, 174, 175, 176, 177])
    packed = lay_out(group, share=True, hidden_size=896)
    assert packed.input_ids_RL.shape == (
        2,
        88 + (170 + 171 + 172 + 173 + 174 + 175 + 176 + 177) // 2 - 4,
    )
    assert [int(line.max()) for line in packed.segment_RL] == [4, 4]
    # one long response beside short ones: padding counts
    uneven = lay_out(make_rollout([10], [90, 30, 30, 30]), share=True, hidden_size=896)
    assert uneven.input_ids_RL.shape == (1, 10 + 90 + 3 * 30 - 4)


def test_a_row_without_response_still_makes_a_line():
    packed = lay_out(make_rollout([3], [0, 0]), share=True, hidden_size=8)
    assert packed.input_ids_RL.shape[1] == 3
    assert not packed.index_BT.any()


def test_rows_that_are_padded_on_the_wrong_side_are_refused():
    rollout = make_rollout([3, 5], [4, 2])
    lay_out(rollout, share=True, hidden_size=8)
    flipped = replace(rollout, response_mask_BT=rollout.response_mask_BT.flip(1))
    with pytest.raises(
        UserError,
        match=r"`Rollout.response_mask_BT`: responses must be padded on the right .* row 1",
    ):
        lay_out(flipped, share=True, hidden_size=8)
    mask = rollout.attention_mask_BL.clone()
    mask[:, :5] = mask[:, :5].flip(1)
    with pytest.raises(
        UserError, match=r"`Rollout.attention_mask_BL`: prompts must be padded on the left .* row 0"
    ):
        lay_out(replace(rollout, attention_mask_BL=mask), share=True, hidden_size=8)
