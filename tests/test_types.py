"""Selecting rows, cutting columns and moving batches."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.types import (
    Experience,
    PromptRow,
    Rollout,
    take_rows,
    to_device,
    trim,
    trim_rollout,
)
from tests.support.builders import PAD, make_rollout, seeded

PROMPTS, RESPONSES = [3, 6, 2], [4, 1, 0, 5, 7, 2]


def experience(left: int = 0, right: int = 0) -> Experience:
    """Return an experience with every optional field filled; extra columns hold padding."""
    rollout = make_rollout(PROMPTS, RESPONSES, support=4, slots=True, left=left, right=right)
    B, T = rollout.response_mask_BT.shape
    g = seeded(7)
    values = torch.nn.functional.pad(torch.randn(6, B, T - right, generator=g), (0, right))
    logits = torch.nn.functional.pad(torch.randn(B, T - right, 4, generator=g), (0, 0, 0, right))
    rows = tuple(PromptRow(str(b), "") for b in range(B))
    outside = rollout.response_mask_BT & (torch.arange(T) == 1)
    rollout = replace(
        rollout,
        kept_mass_BT=values[0],
        outside_BT=outside,
        candidates_BTK=(logits[..., :3] * 9).int(),
        candidate_logprobs_BTK=logits[..., :3].masked_fill(logits[..., 1:] > 0.5, -torch.inf),
        reveal_BT=torch.arange(T).expand(B, T).int(),
        reveal_entropy_BT=values[5].abs(),
        hidden_BCL=rollout.attention_mask_BL[:, None].repeat(1, 2, 1),
        copy_weights_BCT=rollout.response_mask_BT[:, None].float().repeat(1, 2, 1),
        texts=tuple("abcdef"),
        rows=rows,
    )
    return Experience(
        rollout=rollout,
        rewards_B=torch.arange(B).float(),
        valid_B=torch.tensor([True, True, False, True, False, True]),
        advantages_BT=values[1],
        token_weights_BT=rollout.response_mask_BT.float(),
        segments_BT=torch.arange(T).expand(B, T),
        old_logprobs_BT=values[2],
        old_future_BTM=logits[..., :2],
        reference_logprobs_BT=values[3],
        reference_logits_BTK=logits,
        values_BT=values[4],
        returns_BT=values[5],
        old_entropy_BT=values[0].abs(),
        future_advantages_BT=values[2],
        correction_BT=values[1].exp() * rollout.response_mask_BT,
    )


def tensors(batch: Experience | Rollout) -> dict[str, Tensor]:
    """Return all tensors by name, also those of the rollout inside."""
    found = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            found[item.name] = value
        elif isinstance(value, Rollout):
            found |= tensors(value)
    return found


def test_the_fixture_fills_every_tensor_field():
    names = {
        f.name
        for f in (*fields(Rollout), *fields(Experience))
        if f.name.rsplit("_", 1)[-1].startswith("B")
    }
    assert names == set(tensors(experience()))


def test_take_rows_takes_them_from_every_field_and_leaves_the_texts():
    batch, index = experience(), torch.tensor([4, 0, 4])
    taken = take_rows(batch, index)
    for name, value in tensors(batch).items():
        assert torch.equal(tensors(taken)[name], value[index]), name
    assert taken.rollout.texts == ()
    assert taken.rollout.rows == ()
    assert batch.rollout.texts == tuple("abcdef")  # the argument is as it was


def test_take_rows_takes_texts_and_prompt_rows_where_they_are_asked_for():
    batch = experience()
    taken = take_rows(batch, torch.tensor([4, 0, 4]), texts=True)
    assert taken.rollout.texts == ("e", "a", "e")
    assert [row.prompt for row in taken.rollout.rows] == ["4", "0", "4"]
    assert take_rows(make_rollout(PROMPTS, RESPONSES), torch.tensor([1]), texts=True).texts == ()


def test_take_rows_keeps_what_is_missing_missing():
    taken = take_rows(make_rollout(PROMPTS, RESPONSES), torch.tensor([1]))
    assert taken.support_BTK is None
    assert taken.kept_mass_BT is None


def test_trim_cuts_padding_and_nothing_else():
    plain = experience()
    trimmed = trim(experience(left=3, right=2))
    assert trimmed.rollout.prompt_length == plain.rollout.prompt_length == max(PROMPTS)
    for name, value in tensors(plain).items():
        assert torch.equal(tensors(trimmed)[name], value), name


def test_trim_keeps_every_token_of_the_rows_that_are_left():
    batch = experience()
    for rows in ([0], [5, 4], [1], [2], [0, 1, 5]):
        part = take_rows(batch, torch.tensor(rows))
        trimmed = trim(part)
        width = max(1, max(RESPONSES[row] for row in rows))
        depth = max(PROMPTS[row // 2] for row in rows)
        assert trimmed.rollout.tokens_BL.shape == (len(rows), depth + width)
        assert trimmed.mask_BT.sum() == part.mask_BT.sum()
        for b, _ in enumerate(rows):
            now, then = trimmed.rollout, part.rollout
            mask, before = now.response_mask_BT[b], then.response_mask_BT[b]
            seen, seen_before = now.attention_mask_BL[b], then.attention_mask_BL[b]
            assert torch.equal(now.tokens_BL[b][seen], then.tokens_BL[b][seen_before])
            assert torch.equal(now.responses_BT[b][mask], then.responses_BT[b][before])
            assert torch.equal(now.support_BTK[b][mask], then.support_BTK[b][before])
            assert torch.equal(trimmed.advantages_BT[b][mask], part.advantages_BT[b][before])


def test_trim_is_idempotent():
    once = trim(experience(left=2, right=4))
    twice = trim(once)
    assert all(torch.equal(tensors(twice)[name], value) for name, value in tensors(once).items())
    rollout = trim_rollout(make_rollout(PROMPTS, RESPONSES, left=2, right=4))
    again = trim_rollout(rollout)
    assert all(torch.equal(tensors(again)[name], value) for name, value in tensors(rollout).items())
    assert rollout.prompt_length == max(PROMPTS)


def test_trim_keeps_one_column_where_no_row_has_tokens():
    empty = take_rows(experience(), torch.tensor([2]))
    assert trim(empty).mask_BT.tolist() == [[False]]


def test_to_device_moves_every_tensor_and_keeps_the_rest():
    batch = experience()
    moved = to_device(batch, torch.device("meta"))
    assert {value.device.type for value in tensors(moved).values()} == {"meta"}
    assert set(tensors(moved)) == set(tensors(batch))
    assert moved.rollout.texts == batch.rollout.texts
    assert moved.rollout.rows == batch.rollout.rows
    assert batch.rewards_B.device.type == "cpu"


def test_responses_are_the_columns_behind_the_prompt():
    rollout = make_rollout([2], [3, 1], left=1)
    assert rollout.prompt_length == 3
    assert torch.equal(rollout.responses_BT, rollout.tokens_BL[:, 3:])
    assert rollout.tokens_BL[0, 0] == PAD


@pytest.mark.parametrize("field", ["response", "valid", "weight"])
def test_the_loss_mask_needs_a_sampled_token_a_valid_row_and_a_weight(field):
    batch = experience()
    mask = batch.mask_BT
    expected = [[t < RESPONSES[b] and bool(batch.valid_B[b]) for t in range(7)] for b in range(6)]
    assert mask.tolist() == expected
    weights = batch.token_weights_BT.clone()
    weights[0, 1] = 0
    later = batch.rollout.response_mask_BT & (torch.arange(7) != 0)
    changed = {
        "response": replace(batch, rollout=replace(batch.rollout, response_mask_BT=later)),
        "valid": replace(batch, valid_B=torch.zeros(6, dtype=torch.bool)),
        "weight": replace(batch, token_weights_BT=weights),
    }[field].mask_BT
    lost = {
        "response": mask & (torch.arange(7) == 0),
        "valid": mask,
        "weight": mask & (weights == 0),
    }[field]
    assert torch.equal(changed, mask & ~lost)
    assert lost.any()
