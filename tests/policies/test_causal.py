"""Scores and gradients of a policy against plain transformers, one row at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.types import take_rows
from tests.support.adapters import (
    PROMPTS,
    RESPONSES,
    always_share,  # noqa: F401
    gradients,
    score,
)
from tests.support.builders import VOCABULARY, make_rollout, naive_logprobs, relative_error, seeded

ORDER = [3, 0, 8, 5, 1, 2, 7, 4, 6]


@pytest.fixture(scope="module")
def double(tiny_policy):
    """One policy in float64 that shares prompts wherever it may, one that never does."""
    return {share: tiny_policy(double=True, share_prompts=share) for share in (True, False)}


def flat(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": ORDER},
        {"order": ORDER, "left": 3, "right": 2},
        {"support": 5},
        {"support": 6, "slots": True, "order": ORDER, "right": 1},
        {"support": VOCABULARY},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_scores_and_gradients_equal_plain_transformers_row_by_row(
    double, options, temperature, share
):
    policy, rollout = double[share], make_rollout(PROMPTS, RESPONSES, **options)
    mask = rollout.response_mask_BT
    scores = policy.score(
        rollout, mask, temperature=temperature, request=ScoreRequest(entropy_grad=True)
    )
    logprobs, entropies = naive_logprobs(policy.network, rollout, temperature=temperature)
    torch.testing.assert_close(scores.logprobs_BT[mask].double(), flat(logprobs), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.entropy_BT[mask].double(), flat(entropies), rtol=0, atol=1e-5)
    assert not scores.logprobs_BT[~mask].any()
    assert not scores.entropy_BT[~mask].any()
    weights = torch.randn(2, int(mask.sum()), generator=seeded(3), dtype=torch.float64)
    own = (weights[0] * scores.logprobs_BT[mask]).sum() + (
        weights[1] * scores.entropy_BT[mask]
    ).sum()
    naive = (weights[0] * flat(logprobs)).sum() + (weights[1] * flat(entropies)).sum()
    for value, expected in zip(gradients(policy, own), gradients(policy, naive), strict=True):
        assert relative_error(value, expected) < 1e-5


def test_a_support_of_the_whole_vocabulary_is_the_full_softmax(double):
    """A support of the whole vocabulary: docs/algorithms.md 16.2, invariant 2."""
    full = make_rollout(PROMPTS, RESPONSES)
    whole = make_rollout(PROMPTS, RESPONSES, support=VOCABULARY)
    assert torch.equal(full.tokens_BL, whole.tokens_BL)
    one, other = (double[True].score(r, r.response_mask_BT, temperature=0.8) for r in (full, whole))
    torch.testing.assert_close(one.logprobs_BT, other.logprobs_BT, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.entropy_BT, other.entropy_BT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("support", [None, 5])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
def test_only_the_tokens_asked_for_are_scored(double, share, support):
    policy, rollout = double[share], make_rollout(PROMPTS, RESPONSES, support=support)
    mask = rollout.response_mask_BT & (
        torch.rand(rollout.response_mask_BT.shape, generator=seeded(1)) < 0.5
    )
    mask[0] = False
    every = policy.score(rollout, rollout.response_mask_BT, temperature=1.0)
    some = policy.score(rollout, mask, temperature=1.0)
    torch.testing.assert_close(some.logprobs_BT, every.logprobs_BT * mask, rtol=0, atol=1e-6)
    torch.testing.assert_close(some.entropy_BT, every.entropy_BT * mask, rtol=0, atol=1e-6)


@pytest.mark.parametrize("support", [None, 5])
def test_nothing_to_score_is_scored_as_nothing(double, support):
    """An empty micro-batch still takes part in the backward pass, at gradient 0."""
    rollout = make_rollout(PROMPTS, RESPONSES, support=support)
    scores = double[True].score(
        rollout, torch.zeros_like(rollout.response_mask_BT), temperature=1.0
    )
    assert not scores.logprobs_BT.any()
    assert not any(gradient.any() for gradient in gradients(double[True], scores.logprobs_BT.sum()))


@pytest.mark.parametrize("support", [None, 5])
def test_entropy_carries_gradient_only_if_asked(double, support):
    rollout = make_rollout(PROMPTS, RESPONSES, support=support)
    policy, mask = double[True], rollout.response_mask_BT
    assert not policy.score(rollout, mask, temperature=1.0).entropy_BT.requires_grad
    assert policy.score(
        rollout, mask, temperature=1.0, request=ScoreRequest(entropy_grad=True)
    ).entropy_BT.requires_grad
    with torch.no_grad():
        assert not policy.score(rollout, mask, temperature=1.0).logprobs_BT.requires_grad


def test_sharing_is_for_plain_attention_only(tiny_policy):
    assert tiny_policy().can_share_prompts
    assert not tiny_policy(share_prompts=False).can_share_prompts

    def window(policy):
        policy.config.sliding_window = 4

    def eager(policy):
        policy.config._attn_implementation = "eager"

    assert not tiny_policy(prepare=window).can_share_prompts
    assert not tiny_policy(prepare=eager).can_share_prompts


def test_a_micro_batch_may_be_any_rows_of_a_rollout(double):
    rollout = make_rollout(PROMPTS, RESPONSES, order=ORDER)
    every = score(double[True], rollout)
    for rows in ([0], [4, 2], [8, 7, 6, 5, 4, 3, 2, 1, 0]):
        index = torch.tensor(rows)
        torch.testing.assert_close(
            score(double[True], take_rows(rollout, index)), every[index], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("options", [{}, {"support": 6, "slots": True}], ids=["full", "support"])
def test_candidates_are_scored_where_they_were_recorded_and_cost_no_gradient(
    double, options, share
):
    """Any rows, any padding, any mask; slots without an id are -inf, and so are masked places."""
    policy, request = double[share], ScoreRequest(candidates=True)
    plain = make_rollout(PROMPTS, RESPONSES, order=ORDER, right=2, left=1, **options)
    mask = plain.response_mask_BT
    g = seeded(5)
    recorded = -torch.rand(*mask.shape, 4, generator=g)
    recorded = recorded.masked_fill(torch.rand(recorded.shape, generator=g) < 0.3, -torch.inf)
    pool = (
        torch.rand(*mask.shape, VOCABULARY, generator=g).argsort(-1)
        if not options
        else plain.support_BTK
    )
    wild = torch.where(
        recorded > -torch.inf, pool[..., :4], 10**6
    ).int()  # ids of empty slots are never read
    rollout = replace(plain, candidates_BTK=wild, candidate_logprobs_BTK=recorded)
    some = mask & (torch.rand(mask.shape, generator=g) < 0.7)
    scores = policy.score(rollout, some, temperature=0.7, request=request)
    for b, t, k in (recorded > -2).nonzero().tolist():
        found = scores.candidate_logprobs_BTK[b, t, k].item()
        if not some[b, t] or recorded[b, t, k] == -torch.inf:
            assert found == -float("inf")
            continue
        length = int(mask[b, :t].sum())
        prompt = rollout.tokens_BL[b, : rollout.prompt_length][
            rollout.attention_mask_BL[b, : rollout.prompt_length]
        ]
        text = torch.cat([prompt, rollout.responses_BT[b, :length]])
        with torch.no_grad():
            logits = policy.network(input_ids=text[None], use_cache=False).logits[0, -1] / 0.7
        if options:
            held = rollout.support_BTK[b, t][rollout.support_mask_BTK[b, t]].long()
            barred = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, held, False)
            logits = logits.masked_fill(barred, -torch.inf)
        assert found == pytest.approx(logits.log_softmax(0)[wild[b, t, k]].item(), abs=1e-6)
    assert (scores.candidate_logprobs_BTK[recorded == -torch.inf] == -torch.inf).all()
    without = policy.score(rollout, some, temperature=0.7)
    assert without.candidate_logprobs_BTK is None
    assert torch.equal(scores.logprobs_BT, without.logprobs_BT)
    pairs = zip(*(gradients(policy, s.logprobs_BT.sum()) for s in (scores, without)), strict=True)
    assert all(relative_error(one, other) < 1e-12 for one, other in pairs)
    index = torch.tensor([4, 2])
    part = policy.score(take_rows(rollout, index), some[index], temperature=0.7, request=request)
    torch.testing.assert_close(
        part.candidate_logprobs_BTK, scores.candidate_logprobs_BTK[index], rtol=0, atol=1e-6
    )
    with pytest.raises(UserError, match="the rollout records no candidates"):
        policy.score(plain, mask, temperature=0.7, request=request)
