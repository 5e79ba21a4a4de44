"""The policy of a masked language model: states, logits and scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.types import take_rows
from tests.support.builders import make_rollout
from tests.support.masked import MASK, all_hidden, masked_rollout, naive_score


def score(policy, rollout, **options):
    options = {"temperature": 0.7} | options
    return policy.score(rollout, rollout.response_mask_BT, **options)


def gradients(policy, loss):
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name: weight.grad.clone() for name, weight in policy.named_parameters()}


def passes(policy):
    """Return a list to which each pass of the network adds its token ids."""
    seen = []
    policy.network.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    return seen


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", [None, 5], ids=["full", "support"])
@pytest.mark.parametrize("shift", [False, True], ids=["here", "shifted"])
def test_the_score_is_the_naive_sum_over_copies(tiny_masked, support, shift):
    policy, rollout = tiny_masked(), masked_rollout(support=support, copies=3)
    policy.shift = shift
    scores = score(policy, rollout)
    logprobs, entropy = naive_score(policy, rollout, temperature=0.7)
    torch.testing.assert_close(scores.logprobs_BT.double(), logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores.entropy_BT.double(), entropy, atol=1e-4, rtol=1e-4)
    assert scores.on_support is bool(support)


def test_a_shifted_policy_checks_the_shifted_logits(tiny_masked):
    shifted = tiny_masked(prepare=lambda policy: setattr(policy, "shift", True))
    ids, mask = torch.arange(3, 9)[None], torch.ones(1, 6, dtype=torch.bool)
    states = tiny_masked().states(ids, mask)
    torch.testing.assert_close(shifted.states(ids, mask)[:, 1:], states[:, :-1])


def test_rows_do_not_depend_on_padding_and_neighbours(tiny_masked):
    policy, rollout = tiny_masked(), masked_rollout(left=3)
    together = score(policy, rollout)
    tight = score(policy, masked_rollout())
    torch.testing.assert_close(tight.logprobs_BT, together.logprobs_BT, atol=1e-5, rtol=1e-5)
    for b in range(4):
        alone = score(policy, take_rows(rollout, torch.tensor([b])))
        torch.testing.assert_close(
            alone.logprobs_BT[0], together.logprobs_BT[b], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(alone.entropy_BT[0], together.entropy_BT[b])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1e9])
def test_barred_ids_have_no_probability_and_no_gradient(tiny_masked, temperature):
    policy, rollout = tiny_masked(), masked_rollout(left=2)
    ids = rollout.tokens_BL.masked_fill(rollout.hidden_BCL[:, 0], MASK)
    logits = policy.logits(policy.states(ids, rollout.attention_mask_BL).flatten(0, 1))
    assert (logits[:, list(policy.barred)] == -torch.inf).all()
    request = ScoreRequest(entropy_grad=True)
    scores = score(policy, rollout, request=request, temperature=temperature)
    grads = gradients(policy, scores.logprobs_BT.sum() + scores.entropy_BT.sum())
    assert all(grad.isfinite().all() for grad in grads.values())
    bias, (embedding,) = (
        grads["network.cls.predictions.bias"],
        [grad for name, grad in grads.items() if "word_embeddings" in name],
    )
    assert (bias[list(policy.barred)] == 0).all()
    assert bias.any()
    # PAD stands at no position that is attended to, and MASK does
    assert (embedding[0] == 0).all()
    assert (embedding[MASK] != 0).any()
    # at an infinite temperature, all other ids are as probable
    if temperature == 1e9:
        count = torch.tensor(float(policy.vocabulary - len(policy.barred)))
        scored = (rollout.copy_weights_BCT.sum(1) > 0) & rollout.response_mask_BT
        torch.testing.assert_close(scores.entropy_BT[scored], count.log().expand(scored.sum()))


def test_pad_is_not_barred_where_it_ends_responses(tiny_masked):
    policy = tiny_masked()
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    del policy.__dict__["_never_drawn"]
    assert policy.barred == (MASK,)


def test_prompts_and_padding_reach_the_network_as_they_are(tiny_masked):
    policy, rollout = tiny_masked(), masked_rollout(copies=2)
    seen, S = passes(policy), rollout.prompt_length
    score(policy, rollout)
    for c, ids_BL in enumerate(seen):
        hidden_BL = rollout.hidden_BCL[:, c]
        assert torch.equal(ids_BL[:, :S], rollout.tokens_BL[:, :S])
        assert torch.equal(ids_BL == MASK, hidden_BL)
        assert torch.equal(ids_BL[~hidden_BL], rollout.tokens_BL[~hidden_BL])
    assert not torch.equal(seen[0], seen[1])


def test_the_network_makes_logits_of_one_position(tiny_masked):
    policy, shapes = tiny_masked(), []
    head = policy.network.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    policy.states(torch.full((3, 9), 5), torch.ones(3, 9, dtype=torch.bool))
    assert shapes == [(3, 1, policy.vocabulary)]


def test_copies_are_needed(tiny_masked):
    with pytest.raises(UserError, match="a masked policy scores noised copies of rows"):
        score(tiny_masked(), make_rollout([3], [2]))


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("support", [None, 5], ids=["full", "support"])
def test_copies_that_are_computed_again_have_the_gradient_of_separate_ones(tiny_masked, support):
    policy, rollout = tiny_masked(double=True), masked_rollout(copies=3, support=support)
    seen = passes(policy)
    together = gradients(policy, score(policy, rollout).logprobs_BT.sum())
    assert len(seen) == 6, "three copies, and each once more in the backward pass"
    parts = [
        replace(
            rollout,
            hidden_BCL=rollout.hidden_BCL[:, [c]],
            copy_weights_BCT=rollout.copy_weights_BCT[:, [c]],
        )
        for c in range(3)
    ]
    seen.clear()
    separate = gradients(policy, sum(score(policy, part).logprobs_BT.sum() for part in parts))
    assert len(seen) == 3, "one copy is not computed again"
    for name, grad in together.items():
        torch.testing.assert_close(grad, separate[name], msg=name)


def test_only_copies_that_score_a_token_are_passed(tiny_masked):
    policy, rollout = tiny_masked(), masked_rollout(copies=3)
    seen, mask_BT = passes(policy), rollout.response_mask_BT
    with torch.no_grad():
        whole = score(policy, rollout).logprobs_BT
        rest = replace(rollout, copy_weights_BCT=rollout.copy_weights_BCT.clone())
        rest.copy_weights_BCT[:, 1] = 0
        seen.clear()
        part = score(policy, rest).logprobs_BT
    assert len(seen) == 2
    only = replace(
        rollout,
        hidden_BCL=rollout.hidden_BCL[:, [1]],
        copy_weights_BCT=rollout.copy_weights_BCT[:, [1]],
    )
    torch.testing.assert_close(part + score(policy, only).logprobs_BT.detach(), whole)
    # no token at all: zeros, with a gradient for each weight
    seen.clear()
    none = policy.score(rollout, mask_BT & False, temperature=1.0)
    assert len(seen) == 1
    assert not none.logprobs_BT.any()
    assert not none.entropy_BT.any()
    assert not any(grad.any() for grad in gradients(policy, none.logprobs_BT.sum()).values())


def test_the_frozen_copy_scores_as_the_policy_did(tiny_masked):
    policy, rollout = tiny_masked(reference=True), all_hidden(masked_rollout())
    before = score(policy, rollout).logprobs_BT.detach()
    with torch.no_grad():
        for weight in policy.parts()["policy"]:
            weight.add_(0.1 * torch.randn(weight.shape))
    assert not torch.allclose(score(policy, rollout).logprobs_BT, before, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(score(policy, rollout, reference=True).logprobs_BT, before)
        ids = rollout.tokens_BL, rollout.attention_mask_BL
        states = [policy.states(*ids, reference=reference)[:, -1] for reference in (False, True)]
        assert not torch.allclose(*states, atol=1e-3)
        logits = policy.logits(states[1], reference=True)
        assert not torch.allclose(logits, policy.logits(states[1]), atol=1e-3)
