"""Batches, padding and shared prompts of the local sampler change no token."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.types import Finish, PromptBatch, Rollout
from tests.support.builders import END, make_prompts
from tests.support.sampled import PROMPTS, G, Ragged, responses, sample

# --- shortcuts ------------------------------------------------------------------------------------------------------


def assert_same(one: Rollout, other: Rollout) -> None:
    assert responses(one) == responses(other)
    assert one.finish_B.tolist() == other.finish_B.tolist()
    assert one.texts == other.texts
    assert torch.equal(one.group_B, other.group_B)
    for name in ("behaviour_logprobs_BT", "kept_mass_BT"):
        a, b = getattr(one, name), getattr(other, name)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    if one.support_BTK is not None:
        assert torch.equal(one.support_BTK, other.support_BTK)


@pytest.mark.parametrize("batch_size", [1, G, 2 * G, 3 * G + 1])
@pytest.mark.parametrize(
    "support", [FullVocabulary(), TopK(5), Ragged()], ids=["full", "top5", "ragged"]
)
def test_decoding_in_batches_changes_nothing(policy, support, batch_size):
    assert_same(
        sample(policy, support=support, batch_size=batch_size), sample(policy, support=support)
    )


def test_finished_rows_leave_the_batch(policy):
    widths = []
    handle = policy.decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    rollout = sample(policy)
    handle.remove()
    S = rollout.prompt_length
    assert widths[0] == (len(PROMPTS), S)  # a prompt is read once for its group
    assert all(width == 1 for _, width in widths[1:])
    batches = [rows for rows, _ in widths[1:]]
    lengths = rollout.response_mask_BT.sum(1)
    assert batches == sorted(batches, reverse=True)
    assert batches[-1] < len(PROMPTS) * G
    for t, rows in enumerate(batches, start=1):
        running = int((lengths > t).sum())
        assert running <= rows <= running + max(1, rows // 8)


def test_more_padding_on_the_left_changes_nothing(policy):
    wide = sample(policy, make_prompts(PROMPTS, extra=5))
    prompts = make_prompts(PROMPTS, extra=5)
    narrow = PromptBatch(
        prompts.input_ids_PS[:, 5:], prompts.attention_mask_PS[:, 5:], prompts.rows
    )
    assert_same(wide, sample(policy, narrow))


def test_a_prompt_is_answered_alike_alone_and_in_company(policy):
    prompts = make_prompts(PROMPTS)
    alone = PromptBatch(prompts.input_ids_PS[:1], prompts.attention_mask_PS[:1], prompts.rows[:1])
    assert (
        responses(sample(policy, alone)) == responses(sample(policy, prompts))[:G]
    )  # the same uniform numbers


# --- ends -----------------------------------------------------------------------------------------------------------


def test_sampling_stops_when_every_row_has(policy, monkeypatch):
    """With the end token certain after the second one, no third step is taken."""
    logits, steps = policy.logits, []

    def ending(hidden, reference):
        steps.append(len(hidden))
        values = logits(hidden)
        values[:, END] = 100.0 if len(steps) == 2 else -100.0
        return values

    monkeypatch.setattr(policy, "logits", ending)
    rollout = sample(policy, max_new_tokens=50)
    assert len(steps) == 2
    assert rollout.response_mask_BT.shape == (len(PROMPTS) * G, 2)
    assert rollout.response_mask_BT.all()
    assert (rollout.responses_BT[:, 1] == END).all()
    assert (rollout.finish_B == Finish.STOP).all()


def test_one_token_is_one_forward_pass(policy):
    calls = []
    handle = policy.decoder().register_forward_pre_hook(lambda *_: calls.append(1))
    rollout = sample(policy, max_new_tokens=1)
    handle.remove()
    assert len(calls) == 1
    assert rollout.response_mask_BT.tolist() == [[True]] * (len(PROMPTS) * G)
    ends = rollout.responses_BT[:, 0] == END
    assert torch.equal(rollout.finish_B == Finish.STOP, ends)


def test_progress_adds_up_to_the_tokens_drawn(policy):
    seen: list[tuple[int, int]] = []
    rollout = sample(policy, progress=lambda tokens, running: seen.append((tokens, running)))
    assert sum(tokens for tokens, _ in seen) == int(rollout.response_mask_BT.sum())
    lengths = rollout.response_mask_BT.sum(1)
    stopped = rollout.finish_B == Finish.STOP
    assert [running for _, running in seen] == [
        int(((lengths > t + 1) | ((lengths == t + 1) & ~stopped)).sum()) for t in range(len(seen))
    ]


def test_a_single_completion_needs_no_copy_of_the_cache(policy):
    rollout = sample(policy, completions=1)
    assert len(responses(rollout)) == len(PROMPTS)
    mask = rollout.response_mask_BT
    with torch.no_grad():
        scored = policy.score(rollout, mask, temperature=1.0).logprobs_BT
    torch.testing.assert_close(rollout.behaviour_logprobs_BT, scored, rtol=0, atol=1e-5)
