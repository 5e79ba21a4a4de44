"""Families of masked language models: positions, masks and heads of each."""

from __future__ import annotations

from tests.support.masked import masked_rollout


def test_a_gradient_reaches_every_weight(tiny_masked):
    policy, rollout = tiny_masked(), masked_rollout()
    scores = policy.score(rollout, rollout.response_mask_BT, temperature=1.0)
    scores.logprobs_BT.sum().backward()
    assert all(weight.grad is not None for weight in policy.parameters())
