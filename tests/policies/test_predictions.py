"""Predictions of trunk and heads equal the scores of a policy for each id."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.functional.actions import window
from lightning_mpo.policies import SequentialHeads
from lightning_mpo.policies.predictions import ContinuationStates, head_confidence
from tests.support.builders import VOCABULARY, make_rollout
from tests.support.mtp import PROMPTS, REQUEST, RESPONSES, M, _with, each_family

TEMPERATURE = 1.3
CONTINUATIONS = [4, 4, 3, 2, 1, 4]
"""Lengths of three continuations of each of two states."""


def future_of(policy, rollout):
    with torch.no_grad():
        return policy.score(
            rollout, rollout.response_mask_BT, temperature=TEMPERATURE, request=REQUEST
        ).future_BTM


@each_family
@pytest.mark.parametrize("support", [None, 6], ids=["full", "stored"])
@pytest.mark.parametrize("kind", ["stored", "full"])
def test_distributions_give_tokens_the_log_probs_of_scoring(
    policy_with_heads, family, support, kind
):
    policy = policy_with_heads(family, options={"support": kind, "own_unembedding": True})
    rollout = make_rollout([5, 7], CONTINUATIONS, support=support, slots=support is not None)
    ahead = ContinuationStates.of(policy, rollout, M, temperature=TEMPERATURE)
    own = policy.score(rollout, rollout.response_mask_BT, temperature=TEMPERATURE).logprobs_BT
    future = future_of(policy, rollout)
    checked = 0
    for n in range(1, M + 1):
        rows = window(rollout.response_mask_BT, n)[:, 0].nonzero()[:, 0]
        tokens = rollout.responses_BT[rows, n]
        logprobs_nV, inside_nV = ahead.policy_logprobs(n, rows)
        heads_nV = ahead.head_logprobs(n, rows, inside_nV)
        for found, expected in ((logprobs_nV, own[rows, n]), (heads_nV, future[rows, 0, n - 1])):
            chosen = found.gather(1, tokens[:, None])[:, 0].double()
            torch.testing.assert_close(chosen, expected.double().detach(), rtol=1e-6, atol=1e-6)
            total = found.double().exp().sum(-1)
            torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=1e-6)
        assert (inside_nV is None) == (support is None)
        checked += len(rows)
    assert checked == 5 + 4 + 3


@each_family
@pytest.mark.parametrize("support", [None, 6], ids=["full", "stored"])
def test_confidence_is_that_of_the_best_id(policy_with_heads, family, support):
    policy = policy_with_heads(family)
    rollout = make_rollout(PROMPTS, RESPONSES, support=support, slots=support is not None)
    mask_BT = rollout.response_mask_BT
    confidence, hits = head_confidence(policy, rollout, mask_BT, M, temperature=TEMPERATURE)
    future, found = future_of(policy, rollout).exp(), []
    for n in range(1, M + 1):
        alive = window(mask_BT, n)
        assert torch.equal(confidence[..., n - 1] > 0, alive)
        assert not hits[..., n - 1][~alive].any()
        assert (confidence[..., n - 1] >= future[..., n - 1] * alive - 1e-6).all()
        hit = hits[..., n - 1]
        torch.testing.assert_close(
            confidence[..., n - 1][hit].double(), future[..., n - 1][hit].double()
        )
        found.append(int(hit.sum()))
        # a head at 0 does not read token n: put each id there
        row = int(alive[:, 0].nonzero()[0])
        ids = list(range(VOCABULARY))
        if rollout.support_BTK is not None:
            slots = rollout.support_mask_BTK[row, n]
            ids = rollout.support_BTK[row, n][slots].tolist()
        table = [
            float(future_of(policy, _with(rollout, row, n, v)).exp()[row, 0, n - 1]) for v in ids
        ]
        assert float(confidence[row, 0, n - 1]) == pytest.approx(max(table), rel=1e-5)
        best = ids[table.index(max(table))]
        right = _with(rollout, row, n, best)
        assert head_confidence(policy, right, mask_BT, M, temperature=TEMPERATURE)[1][row, 0, n - 1]
        wrong = _with(rollout, row, n, next(v for v in ids if v != best))
        assert not head_confidence(policy, wrong, mask_BT, M, temperature=TEMPERATURE)[1][
            row, 0, n - 1
        ]
    assert sum(found) > 0


def test_only_heads_that_read_ahead_depend_on_the_continuation(policy_with_heads):
    rollout = make_rollout([5], [4, 4, 4])
    for family in (SequentialHeads, type(policy_with_heads().mtp)):
        ahead = ContinuationStates.of(policy_with_heads(family), rollout, M, temperature=1.0)
        first, second = (ahead.head_logprobs(2, torch.tensor([row]), None) for row in (0, 1))
        assert torch.allclose(first, second) == (family is not SequentialHeads)


def test_nothing_is_predicted_without_heads(tiny_policy):
    rollout = make_rollout([5], [4])
    with pytest.raises(RuntimeError, match="no multi-token heads"):
        ContinuationStates.of(tiny_policy(), replace(rollout), M, temperature=1.0)
