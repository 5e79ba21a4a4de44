"""Ends of rows, records and options of the diffusion sampler."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.sampling.diffusion import DiffusionSampler
from lightning_mpo.types import NEVER, Finish
from tests.support.builders import END, make_prompts
from tests.support.masked_table import MaskedTable
from tests.support.revealed import BLOCK, PROMPTS, G, T, reveal

POLICY, ENDING = MaskedTable(), MaskedTable(end=6.0)


def test_a_block_of_end_tokens_ends_a_row_early():
    rollout, early = reveal(ENDING), 0
    for tokens, steps, logprobs, entropies in zip(
        rollout.responses_BT.tolist(),
        rollout.reveal_BT.tolist(),
        rollout.behaviour_logprobs_BT.tolist(),
        rollout.reveal_entropy_BT.tolist(),
        strict=True,
    ):
        blocks = [tokens[i : i + BLOCK] == [END] * BLOCK for i in range(0, T, BLOCK)]
        behind = T if True not in blocks else (blocks.index(True) + 1) * BLOCK
        early += behind < T
        assert tokens[behind:] == [END] * (T - behind)
        assert steps[behind:] == [NEVER] * (T - behind)
        assert NEVER not in steps[:behind]
        assert logprobs[behind:] == entropies[behind:] == [0.0] * (T - behind)
        assert all(value < 0 for value in logprobs[:behind])
    assert 0 < early < len(rollout.rows)


def test_each_of_several_end_tokens_ends_a_row():
    policy = MaskedTable(end=4.0, ends=(END, 5))
    policy.place[:, 5] += 4.0
    rollout = reveal(policy)
    blocks = [
        row[i : i + BLOCK] for row in rollout.responses_BT.tolist() for i in range(0, T, BLOCK)
    ]
    both = [block for block in blocks if set(block) == {END, 5}]
    assert both
    assert (rollout.reveal_BT == NEVER).any()
    assert (rollout.responses_BT[rollout.reveal_BT == NEVER] == END).all()
    for row, mask in zip(rollout.responses_BT.tolist(), rollout.response_mask_BT, strict=True):
        ends = [t for t, token in enumerate(row) if token in (END, 5)]
        assert int(mask.sum()) == (ends[0] + 1 if ends else T)


def test_ended_rows_leave_the_batch_and_sampling_ends_with_the_last_one():
    policy, calls = MaskedTable(end=60.0), []
    rollout = reveal(policy, progress=lambda tokens, rows: calls.append((tokens, rows)))
    rows = len(rollout.rows)
    assert policy.passes == BLOCK
    assert calls == [(rows, rows)] * (BLOCK - 1) + [(rows, 0)]
    calls.clear()
    reveal(ENDING, progress=lambda tokens, rows: calls.append((tokens, rows)))
    assert len(calls) == T
    left = [rows for _, rows in calls]
    assert left == sorted(left, reverse=True)
    assert 0 < left[BLOCK] < rows
    assert left[-1] == 0
    assert [tokens for tokens, _ in calls[1:]] == left[:-1]


@pytest.mark.parametrize("policy", [POLICY, ENDING], ids=["long", "ending"])
def test_a_response_ends_with_its_first_end_token_and_the_canvas_stays_whole(policy):
    rollout = reveal(policy)
    assert rollout.responses_BT.shape == (len(PROMPTS) * G, T)
    S = rollout.prompt_length
    prompts = make_prompts(PROMPTS)
    assert rollout.attention_mask_BL[:, S:].all()
    expected = prompts.attention_mask_PS.repeat_interleave(G, 0)
    assert torch.equal(rollout.attention_mask_BL[:, :S], expected)
    for b, tokens in enumerate(rollout.responses_BT.tolist()):
        length = tokens.index(END) + 1 if END in tokens else T
        assert rollout.response_mask_BT[b].tolist() == [t < length for t in range(T)]
        finish = Finish.STOP if END in tokens else Finish.LENGTH
        assert int(rollout.finish_B[b]) == finish
        letters = [token for token in tokens[:length] if token != END]
        assert rollout.texts[b] == "".join(chr(97 + token) for token in letters)
    assert rollout.group_B.tolist() == [p for p in range(len(PROMPTS)) for _ in range(G)]
    assert [row.prompt for row in rollout.rows] == [
        str(p) for p in range(len(PROMPTS)) for _ in range(G)
    ]


def test_the_sampler_refuses_a_causal_policy_and_a_canvas_that_blocks_do_not_fill(tiny_policy):
    with pytest.raises(UserError, match=r"TinyPolicy is a causal one: use `rollout.sampler: null`"):
        reveal(tiny_policy())
    with pytest.raises(UserError, match=r"\(10\) must be a multiple of .* \(4\).*use 8 or 12"):
        reveal(POLICY, max_new_tokens=10)
    with pytest.raises(UserError, match="use 4, or another block"):
        DiffusionSampler(4).check_canvas(3)
    DiffusionSampler(4).check(0)
    with pytest.raises(UserError, match="compares 3 candidates .* set `top_k: null`"):
        DiffusionSampler(4).check(3)
