"""Calibration and KL divergence of heads against all continuations, and states chosen by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.actions import window
from lightning_mpo.functional.head_diagnostics import calibration_sums, excess_entropy
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.policies import MedusaHeads, ParallelHeads, SequentialHeads
from lightning_mpo.policies.predictions import ContinuationStates, head_confidence
from lightning_mpo.rollout.head_measures import HeadMeasures, draw_states
from lightning_mpo.rollout.scorer import Scorer
from tests.support.builders import make_rollout, right_padded, seeded
from tests.support.mtp import scramble

M = 2
RESPONSES = [5, 3, 1, 4, 2, 6]


def measures(policy, **options) -> HeadMeasures:
    return HeadMeasures(Scorer(policy, **options), policy, M)


def test_calibration_is_of_all_tokens_with_a_target_whatever_the_pass(tiny_policy):
    policy = tiny_policy(mtp=ParallelHeads(offsets=M), double=True)
    scramble(policy.mtp)
    rollout = make_rollout([4, 6], RESPONSES)
    confidence, hits = head_confidence(
        policy, rollout, rollout.response_mask_BT, M, temperature=0.7
    )
    for tokens in (8, 10_000):
        found = measures(policy, temperature=0.7, tokens=tokens).calibration(rollout)
        for n in range(1, M + 1):
            alive = window(rollout.response_mask_BT, n)
            expected = calibration_sums(confidence[..., n - 1], hits[..., n - 1], alive)
            torch.testing.assert_close(found[n - 1], expected)
            assert found[n - 1, :, 0].sum() == sum(max(length - n, 0) for length in RESPONSES)


CHARACTERS = "01"


def markov(tiny_policy, **options):
    """Return a policy whose next token depends on the last one alone, as its layers output 0."""
    heads = MedusaHeads(offsets=M, own_unembedding=True)
    policy = tiny_policy(characters=CHARACTERS, mtp=heads, double=True, **options)
    with torch.no_grad():
        for layer in policy.network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return policy


def table(policy) -> Tensor:
    """Return the probabilities of the next token, by the last one."""
    decoder, head = policy.decoder(), policy.network.get_output_embeddings()
    ids = torch.arange(policy.vocabulary)[:, None]
    return head(decoder(input_ids=ids).last_hidden_state[:, 0]).softmax(-1).detach()


def calibrate(policy, sharpness: float = 1.0) -> list[Tensor]:
    """Solve for heads that give the true distribution n tokens ahead; return these distributions.

    A response that ends has no tokens behind it, so that the end takes no part in between.
    """
    end, p_VV = policy.end_tokens[0], table(policy)
    hidden_VD = policy.decoder()(input_ids=torch.arange(len(p_VV))[:, None]).last_hidden_state[:, 0]
    alive_VV, true = p_VV.clone(), []
    alive_VV[:, end] = 0
    reach_VV = alive_VV
    for head in policy.mtp.unembeddings:
        true_VV = (reach_VV / reach_VV.sum(1, keepdim=True)) @ p_VV
        true.append(true_VV)
        logits_VV = sharpness * true_VV.log()
        with torch.no_grad():
            head.weight.copy_(torch.linalg.lstsq(hidden_VD, logits_VV).solution.T)
        reach_VV = reach_VV @ alive_VV
    return true


def test_heads_that_are_calibrated_by_construction_have_no_excess(tiny_policy):
    """With all continuations, each in its exact proportion, the divergence is 0, or exact for sharper heads."""
    policy = markov(tiny_policy, sharp=2.0)
    end, p_VV = policy.end_tokens[0], table(policy)
    prompt = make_rollout([3], [1])
    last = int(prompt.tokens_BL[0, 2]) % policy.vocabulary
    for sharpness in (1.0, 2.0):
        true = calibrate(policy, sharpness)
        tokens = torch.tensor(list(itertools.product(range(len(p_VV)), repeat=M + 1)))
        ids = torch.cat([torch.full((len(tokens), 1), last), tokens], 1)
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        rollout = replace(
            prompt, tokens_BL=ids, attention_mask_BL=torch.ones(ids.shape).bool(), response_mask_BT=mask,
            group_B=torch.zeros(len(ids), dtype=torch.int64), behaviour_logprobs_BT=mask.float(), finish_B=mask[:, 0].long(),
        )  # fmt: skip
        ahead = ContinuationStates.of(policy, rollout, M, temperature=1.0)
        for n in range(1, M + 1):
            ends_NV, _ = ahead.policy_logprobs(n, torch.arange(len(ids)))
            chances = torch.ones(len(ids), dtype=torch.float64)
            for t in range(n):
                chances *= p_VV[ids[:, t], tokens[:, t]] * (tokens[:, t] != end)
            mean_V = (chances / chances.sum()) @ ends_NV.exp()
            torch.testing.assert_close(mean_V, true[n - 1][last], rtol=1e-6, atol=1e-9)
            head_V = ahead.head_logprobs(n, torch.tensor([0]), None)
            excess = excess_entropy(mean_V.log()[None, None], torch.ones(1, 1).bool(), head_V)
            sharper_V = (sharpness * true[n - 1][last].log()).log_softmax(-1)
            known = (mean_V * (mean_V.log() - sharper_V)).sum()
            assert excess.item() == pytest.approx(known.item(), abs=1e-7)
            assert (excess.item() > 1e-3) == (sharpness == 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_the_estimate_is_near_the_truth(tiny_policy, sharpness):
    policy = markov(tiny_policy, sharp=2.0)
    true = calibrate(policy, sharpness)
    rollout = make_rollout([4], [6, 5])
    rollout.tokens_BL.remainder_(policy.vocabulary)
    states = draw_states(rollout.response_mask_BT, M, 8, seeded(1))
    sums = measures(policy).excess(
        rollout, FullVocabulary(), states=8, samples=1500, generator=seeded(1)
    )
    before = rollout.tokens_BL[states[:, 0], rollout.prompt_length + states[:, 1] - 1]
    for n in range(1, M + 1):
        p_V, q_V = true[n - 1][before], (sharpness * true[n - 1][before].log()).log_softmax(-1)
        expected = (p_V * (p_V.log() - q_V)).sum(-1).mean()
        assert sums[n - 1, 1] == len(states)
        found = sums[n - 1, 0] / sums[n - 1, 1]
        assert found.item() == pytest.approx(expected.item(), abs=0.03)
    assert (found > 0.05) == (sharpness == 2.0)


def test_heads_that_read_the_tokens_in_between_are_compared_one_by_one(tiny_policy):
    """Fresh Medusa heads are the next token's distribution; a sequential head can be the policy itself."""
    policy = tiny_policy(mtp=SequentialHeads(offsets=M), double=True)
    rollout = make_rollout([4], [6, 5])
    sums = measures(policy).excess(
        rollout, FullVocabulary(), states=3, samples=4, generator=seeded(1)
    )
    assert sums[0, 1] > 3, "one value for each continuation"
    assert (sums[:, 0] >= -1e-6).all()


@pytest.mark.parametrize("kind", ["stored", "full"])
def test_on_supports_heads_get_the_ids_that_continuations_may_take(tiny_policy, kind):
    policy = tiny_policy(mtp=ParallelHeads(offsets=M, support=kind), sharp=2.0)
    rollout = make_rollout([4], [6, 5], support=4)
    options = {"states": 4, "samples": 6}
    narrow = measures(policy).excess(rollout, TopK(2), generator=seeded(1), **options)
    assert narrow.isfinite().all()
    assert (narrow[:, 1] > 0).all()
    stored, full = narrow[:, 0] / narrow[:, 1], torch.tensor([1.0, 1.0], dtype=torch.float64)
    # over the whole vocabulary a head wastes most of its probability
    assert bool((stored > full).all()) == (kind == "full")


def test_states_have_a_target_and_room():
    mask_BT = right_padded([6, 3, 1, 5], 6)
    states = draw_states(mask_BT, M, 100, seeded(0)).tolist()
    assert states == [
        [0, 0],
        [0, 1],
        [0, 2],
        [0, 3],
        [1, 0],
        [1, 1],
        [3, 0],
        [3, 1],
        [3, 2],
        [3, 3],
    ]
    few = draw_states(mask_BT, M, 4, seeded(0)).tolist()
    assert len(few) == 4
    assert all(state in states for state in few)
    assert few != draw_states(mask_BT, M, 4, seeded(1)).tolist()
    assert len(draw_states(mask_BT[:, :2], M, 4, seeded(1))) == 0


def test_no_state_no_estimate(tiny_policy):
    policy = tiny_policy(mtp=ParallelHeads(offsets=M))
    sums = measures(policy).excess(
        make_rollout([4], [1, 1]), FullVocabulary(), states=4, samples=4, generator=seeded(0)
    )
    assert sums.tolist() == [[0.0, 0.0]] * M
