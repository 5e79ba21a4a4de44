"""Multi-token heads against one row at a time: values, windows, supports and gradients."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.functional.actions import window
from lightning_mpo.policies import MTPHeads, SequentialHeads
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import VOCABULARY, make_rollout, subclasses
from tests.support.mtp import FAMILIES, PROMPTS, REQUEST, RESPONSES, M, _with, each_family, naive


def test_the_list_has_every_family():
    assert subclasses(MTPHeads) == set(FAMILIES)


@each_family
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("own", [False, True], ids=["tied", "own"])
def test_equals_the_naive_loop(policy_with_heads, family, share, own):
    policy = policy_with_heads(family, share_prompts=share, options={"own_unembedding": own})
    rollout = make_rollout(PROMPTS, RESPONSES, left=2, right=3, order=[3, 0, 8, 5, 1, 2, 7, 4, 6])
    scores = policy.score(rollout, rollout.response_mask_BT, temperature=1.3, request=REQUEST)
    torch.testing.assert_close(
        scores.future_BTM.double(), naive(policy, rollout, temperature=1.3), rtol=1e-9, atol=1e-9
    )
    plain = policy.score(rollout, rollout.response_mask_BT, temperature=1.3)
    torch.testing.assert_close(scores.logprobs_BT, plain.logprobs_BT)
    assert plain.future_BTM is None


@each_family
def test_starts_as_the_trunks_next_token_distribution(policy_with_heads, family):
    """Sequential heads mix an embedding in at random, and start near it only."""
    policy = policy_with_heads(family, fresh=True)
    rollout = make_rollout([4], [6])
    future = policy.score(
        rollout, rollout.response_mask_BT, temperature=1.0, request=REQUEST
    ).future_BTM
    ids = rollout.tokens_BL
    table = policy.network(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    expected = [
        [table[3 + t, ids[0, 4 + t + n]] if t + n < 6 else 0.0 for n in (1, 2, 3)] for t in range(6)
    ]
    if family is SequentialHeads:
        assert torch.isfinite(future).all()
    else:
        torch.testing.assert_close(future[0], torch.tensor(expected, dtype=torch.float64))


@each_family
def test_only_sequential_heads_see_the_tokens_in_between(policy_with_heads, family):
    policy = policy_with_heads(family)
    rollout = make_rollout([4], [6])
    other = make_rollout([4], [6])
    other.tokens_BL[0, 4] = (
        rollout.tokens_BL[0, 4] + 1
    ) % VOCABULARY  # o_0, which lies between h_0 and o_1, o_2, …
    here, there = (
        policy.score(r, r.response_mask_BT, temperature=1.0, request=REQUEST).future_BTM[0, 0]
        for r in (rollout, other)
    )
    assert (not torch.allclose(here, there)) == (family is SequentialHeads)


@each_family
def test_windows_stop_at_gaps_of_the_mask_and_at_the_end(policy_with_heads, family):
    policy = policy_with_heads(family)
    rollout = make_rollout([3], [7, 4])
    whole = rollout.response_mask_BT
    gap = whole.clone()
    gap[0, 3] = False
    full, cut = (
        policy.score(rollout, m, temperature=1.0, request=REQUEST).future_BTM for m in (whole, gap)
    )
    for n in range(1, M + 1):
        alive = window(gap, n)
        assert torch.equal(cut[..., n - 1] != 0, alive)
        torch.testing.assert_close(cut[..., n - 1][alive], full[..., n - 1][alive])


@each_family
def test_gradients_go_where_they_are_told(policy_with_heads, family):
    rollout = make_rollout(PROMPTS, RESPONSES)
    ask = ScoreRequest(future=M, upkeep=True)

    def reached(policy, which):
        policy.zero_grad()
        scores = policy.score(rollout, rollout.response_mask_BT, temperature=1.0, request=ask)
        getattr(scores, which).sum().backward()
        parts = (policy.network.parameters(), policy.mtp.parameters())
        return tuple(any(p.grad is not None and bool(p.grad.any()) for p in part) for part in parts)

    open_, closed = (
        policy_with_heads(family),
        policy_with_heads(family, options={"detach_trunk": True}),
    )
    assert reached(open_, "future_BTM") == (True, True)
    for policy in (
        open_,
        closed,
    ):  # the shared unembedding and norm belong to the trunk: frozen in this test
        policy.network.get_output_embeddings().weight.requires_grad_(False)
        policy.decoder().norm.requires_grad_(False)
    assert reached(open_, "upkeep_BTM") == (False, True)
    assert reached(closed, "future_BTM") == (False, True)
    scores = open_.score(rollout, rollout.response_mask_BT, temperature=1.0, request=ask)
    torch.testing.assert_close(scores.future_BTM, scores.upkeep_BTM)


@each_family
@pytest.mark.parametrize("kept", ["stored", "full"])
def test_the_support_of_offset_n_is_the_one_stored_there(policy_with_heads, family, kept):
    policy = policy_with_heads(family, options={"support": kept})
    rollout = make_rollout(PROMPTS, RESPONSES, support=4, slots=True)
    future = policy.score(
        rollout, rollout.response_mask_BT, temperature=1.0, request=REQUEST
    ).future_BTM
    free = make_rollout(PROMPTS, RESPONSES, support=4, slots=True)
    full = naive(policy, make_rollout(PROMPTS, RESPONSES))
    if kept == "full":
        torch.testing.assert_close(future.double(), full, rtol=1e-8, atol=1e-8)
        return
    for n in range(
        1, M + 1
    ):  # renormalise by hand: the ids of t+n under the distribution of offset n at t
        for b, t in window(free.response_mask_BT, n).nonzero().tolist():
            ids = free.support_BTK[b, t + n].long()[free.support_mask_BTK[b, t + n]]
            swapped = [_with(free, b, t + n, int(i)) for i in ids]
            if family is not SequentialHeads or n == 1:
                mass = torch.stack([naive_at(policy, s, b, t, n) for s in swapped]).logsumexp(0)
                expected = naive_at(policy, free, b, t, n) - mass
                torch.testing.assert_close(
                    future[b, t, n - 1].double(), expected, rtol=1e-7, atol=1e-7
                )
            break


def naive_at(policy, rollout, b, t, n):
    from lightning_mpo.types import take_rows

    return naive(policy, take_rows(rollout, torch.tensor([b])))[0, t, n - 1]
