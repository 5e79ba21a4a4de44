"""A fixed support: barred ids in sampler, score, reference and heads, with one law for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.functional.divergences import k3
from lightning_mpo.modules.rollout_setup import check_support
from lightning_mpo.objective.supports import AllowedTokens, FullVocabulary, MinP, Nucleus, TopK
from lightning_mpo.policies import ParallelHeads
from lightning_mpo.policies.predictions import ContinuationStates
from lightning_mpo.rollout.admission import check_rollout
from lightning_mpo.rollout.evaluation import decodings
from lightning_mpo.sampling.barring import bar_tokens
from lightning_mpo.scores import ScoreRequest
from tests.support.bigram import BigramPolicy
from tests.support.builders import CHARACTERS, END, PAD, make_rollout
from tests.support.sampled import next_logits, responses, sample

DIGITS = AllowedTokens(letters="0123456789")
BARRED = [PAD] + [2 + i for i, text in enumerate(CHARACTERS) if not text.isdigit()]
ALLOWED = [id for id in range(2 + len(CHARACTERS)) if id not in BARRED]
SUPPORTS = [
    DIGITS,
    TopK(3, within=DIGITS),
    TopK(len(ALLOWED), within=DIGITS),
    Nucleus(0.9, 8, within=DIGITS),
    MinP(0.1, 8, within=DIGITS),
]
each_support = pytest.mark.parametrize("support", SUPPORTS, ids=str)


def score(policy, rollout, *, reference=False, temperature=1.0, **request):
    return policy.score(
        rollout,
        rollout.response_mask_BT,
        temperature=temperature,
        reference=reference,
        request=ScoreRequest(**request),
    )


@each_support
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_only_allowed_ids_are_sampled_and_scores_equal_the_records(
    tiny_policy, support, temperature
):
    policy = tiny_policy()
    rollout = sample(policy, support=support, temperature=temperature, candidates=4)
    assert {id for row in responses(rollout) for id in row} <= set(ALLOWED)
    with torch.no_grad():
        scored = score(policy, rollout, temperature=temperature).logprobs_BT
    torch.testing.assert_close(rollout.behaviour_logprobs_BT, scored, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        rollout.behaviour_logprobs_BT.sum(1), scored.sum(1), rtol=0, atol=1e-4
    )
    named = rollout.candidate_logprobs_BTK > -torch.inf
    assert set(rollout.candidates_BTK[named].tolist()) <= set(ALLOWED)
    # nothing is stored for a set that is the same at every step
    assert (rollout.support_BTK is None) == isinstance(support, AllowedTokens)
    check_rollout(rollout, support, policy.vocabulary, behaviour=True, barred=policy.barred)


def test_log_probs_renormalise_over_the_allowed_ids(tiny_policy):
    policy = tiny_policy()
    rollout = sample(policy, support=DIGITS, completions=1)
    with torch.no_grad():
        scored = score(policy, rollout)
    S = rollout.prompt_length
    for b, response in enumerate(responses(rollout)):
        prompt = rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]].tolist()
        for t, token in enumerate(response):
            table = next_logits(policy, prompt + response[:t])[ALLOWED].log_softmax(0)
            expected = table[ALLOWED.index(token)].item()
            assert scored.logprobs_BT[b, t].item() == pytest.approx(expected, abs=1e-5)
            entropy = -(table.exp() * table).sum().item()
            assert scored.entropy_BT[b, t].item() == pytest.approx(entropy, abs=1e-5)


def test_the_reference_is_barred_alike_so_that_the_divergence_is_0_at_the_start(tiny_policy):
    policy = tiny_policy(reference=True)
    rollout = sample(policy, support=DIGITS)
    with torch.no_grad():
        reference = score(policy, rollout, reference=True).logprobs_BT
        assert torch.equal(reference, score(policy, rollout).logprobs_BT)
        policy.network.get_output_embeddings().weight.mul_(1.5)
        moved = k3(score(policy, rollout).logprobs_BT, reference)
        # a reference over the whole vocabulary would add the log of the mass of the allowed ids
        policy.bar(())
        whole = score(policy, rollout, reference=True).logprobs_BT
    assert (whole <= reference).all()
    assert (whole < reference - 1e-3).any()
    assert moved.sum() > 0


def test_logits_of_barred_ids_have_no_gradient(tiny_policy):
    """A direction of W that moves barred logits alone changes no score."""
    policy = tiny_policy()
    rollout = sample(policy, support=DIGITS)
    states = policy.trunk_states(rollout, future=False).after_norm_RLD.detach()
    weight = policy.network.get_output_embeddings().weight
    from lightning_mpo.policies.scoring import ResponseTokens

    index_BT = policy.trunk_states(rollout, future=False).lines.index_BT
    tokens = ResponseTokens.of(rollout, rollout.response_mask_BT, index_BT)
    scores = tokens.logprobs(states, policy._head(**policy.head_form), entropy_grad=True)
    (gradient,) = torch.autograd.grad(scores.logprobs_BT.sum() + scores.entropy_BT.sum(), weight)
    assert (gradient[BARRED] == 0).all()
    assert (gradient[ALLOWED].abs().sum(1) > 0).all()


@pytest.mark.parametrize("kind", ["stored", "full"])
def test_heads_leave_barred_ids_out(tiny_policy, kind):
    policy = tiny_policy(mtp=ParallelHeads(offsets=2, support=kind))
    rollout = sample(policy, support=DIGITS, completions=2)
    future = score(policy, rollout, future=2).future_BTM
    ahead = ContinuationStates.of(policy, rollout, 2, temperature=1.0)
    rows = torch.arange(len(rollout.group_B))
    for n in (1, 2):
        _, inside = ahead.policy_logprobs(n, rows)
        table = ahead.head_logprobs(n, rows, inside)
        assert (table[:, BARRED] == -torch.inf).all()
        torch.testing.assert_close(table.exp().sum(1), torch.ones(len(rows)))
        for b, response in enumerate(responses(rollout)):
            if len(response) > n:
                expected = table[b, response[n]].item()
                assert future[b, 0, n - 1].item() == pytest.approx(expected, abs=1e-5)
    ranks = policy.ranks(rollout, rollout.response_mask_BT, future=2)
    assert int(ranks.max()) < len(ALLOWED)
    assert set(policy.top_k(rollout, rollout.response_mask_BT, 5).unique().tolist()) <= {
        *ALLOWED,
        0,
    }


def test_a_masked_policy_bars_them_beside_mask_and_pad(tiny_masked):
    policy = tiny_masked()
    never = set(policy.barred)
    bar_tokens(policy, DIGITS)
    texts = policy.token_texts
    assert set(policy.barred) == never | {
        id
        for id in range(policy.vocabulary)
        if id not in policy.end_tokens and not texts[id].isdigit()
    }
    hidden = torch.randn(3, 32)
    logits = policy.logits(hidden)
    assert (logits[:, list(policy.barred)] == -torch.inf).all()
    assert torch.isfinite(logits).sum() == 3 * (policy.vocabulary - len(policy.barred))


def test_an_evaluation_stays_within_the_fixed_support(tiny_policy):
    assert decodings(DIGITS, 4).keys() == {""}
    both = decodings(TopK(3, within=DIGITS), 4)
    assert [both[key].support for key in ("", "support_")] == [DIGITS, TopK(3, within=DIGITS)]
    policy = tiny_policy()
    bar_tokens(policy, DIGITS)
    rollout = sample(policy, support=FullVocabulary())
    assert {id for row in responses(rollout) for id in row} <= set(ALLOWED)
    with policy.without_fixed_bar():
        assert not policy.barred
    assert list(policy.barred) == BARRED


def test_a_rollout_with_a_barred_id_is_refused(tiny_policy):
    policy = tiny_policy()
    bar_tokens(policy, DIGITS)
    rollout = make_rollout([3], [4, 4])
    rollout = replace(rollout, tokens_BL=rollout.tokens_BL.masked_fill(rollout.tokens_BL > 0, 13))
    with pytest.raises(UserError, match="have probability 0 under the policy"):
        check_rollout(rollout, DIGITS, policy.vocabulary, behaviour=False, barred=policy.barred)


def test_which_tokens_the_options_allow():
    texts = ["<pad>", "<end>", "A", "AB", "B", "X", "", "A\n"]
    assert AllowedTokens(letters="AB").barred(texts, [1]) == (0, 5, 6, 7)
    assert AllowedTokens(without="X\n").barred(texts, [1]) == (5, 7)
    assert AllowedTokens(letters="AB", ids=[3]).barred(texts, [1]) == (0, 3, 5, 6, 7)
    assert AllowedTokens(ids=[4]).barred(texts, [1]) == (4,)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda p: AllowedTokens(), "`AllowedTokens` bars nothing"),
        (lambda p: AllowedTokens(letters="X", without="X"), "leaves no character beside `without`"),
        (lambda p: AllowedTokens(ids=[-1]), r"`AllowedTokens.ids\[0\]` must be at least 0"),
        (lambda p: check_support(p, AllowedTokens(ids=[99])), "`AllowedTokens.ids` holds 99"),
        (lambda p: check_support(p, AllowedTokens(letters="é")), "allows no token besides the end"),
        (lambda p: check_support(p, AllowedTokens(ids=[END])), "holds all end tokens"),
        (
            lambda p: check_support(p, TopK(12, within=DIGITS)),
            "`objective.support` TopK keeps 12 ids of a step, and 11 of 19 can be drawn",
        ),
        (lambda p: bar_tokens(BigramPolicy(), AllowedTokens(ids=[3])), "which BigramPolicy cannot"),
    ],
)
def test_mistakes_end_in_one_line(tiny_policy, act, message):
    with pytest.raises(UserError, match=message) as caught:
        act(tiny_policy())
    assert "\n" not in str(caught.value)
