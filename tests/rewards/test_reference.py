"""Log-probs of texts under the reference: rows of one prompt are a group, and texts alone return."""

from __future__ import annotations

import torch

from lightning_mpo.rewards.reference import Reference, continuation_rows

CPU = torch.device("cpu")


def test_rows_of_continuations():
    rollout = continuation_rows([[1, 2, 3], [4]], [[], []], [[5], [6, 7]])
    assert rollout.tokens_BL.tolist() == [[1, 2, 3, 5, 0], [0, 0, 4, 6, 7]]
    assert rollout.attention_mask_BL.int().tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert rollout.response_mask_BT.int().tolist() == [[1, 0], [1, 1]]
    assert rollout.group_B.tolist() == [0, 1]


def test_rows_of_one_prompt_are_a_group_and_texts_alone_are_returned():
    parts = [[1, 2], [1, 4], [1, 2]], [[3], [], [9, 8]], [[5], [6], [7, 7]]
    rollout = continuation_rows(*parts)
    assert rollout.tokens_BL.tolist() == [
        [1, 2, 3, 5, 0, 0],
        [1, 4, 6, 0, 0, 0],
        [1, 2, 9, 8, 7, 7],
    ]
    assert rollout.response_mask_BT.sum(1).tolist() == [2, 1, 4]
    assert rollout.group_B.tolist() == [0, 1, 0]
    reference = Reference(lambda rows: -rows.responses_BT.float(), CPU)
    logprobs, mask = reference.continuations(*parts)
    assert logprobs.tolist() == [[-5, 0], [-6, 0], [-7, -7]]
    assert mask.int().tolist() == [[1, 0], [1, 0], [1, 1]]
