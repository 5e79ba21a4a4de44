"""The policy of a masked language model: states, logits and scores."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from tests.support.builders import make_rollout
from tests.support.masked import masked_rollout, naive_score


def score(policy, rollout, **options):
    return policy.score(rollout, rollout.response_mask_BT, temperature=0.7, **options)


@pytest.mark.parametrize("support", [None, 5], ids=["full", "support"])
def test_the_score_is_the_naive_sum_over_copies(tiny_masked, support):
    policy, rollout = tiny_masked(), masked_rollout(support=support, slots=support is not None)
    scores = score(policy, rollout)
    logprobs, entropy = naive_score(policy, rollout, temperature=0.7)
    torch.testing.assert_close(scores.logprobs_BT.double(), logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores.entropy_BT.double(), entropy, atol=1e-4, rtol=1e-4)
    assert scores.on_support is bool(support)


def test_copies_are_needed(tiny_masked):
    with pytest.raises(UserError, match="a masked policy scores noised copies of rows"):
        score(tiny_masked(), make_rollout([3], [2]))
