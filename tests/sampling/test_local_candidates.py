"""Candidates that the local sampler records for the surrogate."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mpo.objective.supports import FullVocabulary, Support, TopK
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import VOCABULARY, make_prompts
from tests.support.sampled import PROMPTS, G, Ragged, next_logits, responses, sample


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize(
    "support", [FullVocabulary(), TopK(5), Ragged()], ids=["full", "top5", "ragged"]
)
def test_candidates_are_the_most_probable_ids_of_what_was_sampled_from(policy, support, k):
    rollout = sample(policy, support=support, temperature=0.7, candidates=k)
    plain = sample(policy, support=support, temperature=0.7)
    assert torch.equal(rollout.tokens_BL, plain.tokens_BL)  # recording changes no draw
    assert plain.candidates_BTK is None
    assert plain.candidate_logprobs_BTK is None
    assert rollout.candidates_BTK.shape[-1] == k + 1
    assert rollout.candidate_logprobs_BTK.dtype == torch.float32
    prompts, others = make_prompts(PROMPTS), 0
    for b, response in enumerate(responses(rollout)):
        prompt = prompts.input_ids_PS[b // G][prompts.attention_mask_PS[b // G]].tolist()
        for t, token in enumerate(response):
            logits = next_logits(policy, prompt + response[:t]) / 0.7
            ids, slots = support.select(logits[None])
            inside = list(range(VOCABULARY)) if ids is None else ids[0].tolist()
            inside = (
                inside
                if slots is None
                else [i for i, slot in zip(inside, slots[0].tolist(), strict=True) if slot]
            )
            logprobs = dict(zip(inside, logits[inside].log_softmax(0).tolist(), strict=True))
            best = sorted(logprobs, key=lambda v, logprobs=logprobs: -logprobs[v])[:k]
            found = rollout.candidate_logprobs_BTK[b, t].tolist()
            held = {
                i: x
                for i, x in zip(rollout.candidates_BTK[b, t].tolist(), found, strict=True)
                if x > -math.inf
            }
            assert list(held)[: len(best)] == best
            assert set(held) == {*best, token}
            assert held == pytest.approx({v: logprobs[v] for v in held}, abs=1e-5)
            assert found[len(best) : k] == [-math.inf] * (k - len(best))
            assert held[token] == rollout.behaviour_logprobs_BT[b, t].item()
            others += token not in best
    assert others > 0 or k == 7
    assert (rollout.candidate_logprobs_BTK[~rollout.response_mask_BT] == -torch.inf).all()


def test_of_equal_candidates_the_lowest_ids_come_first(policy, monkeypatch):
    """Also where the reference ranked the support, so that its slots are in another order."""
    flat = lambda hidden, reference=False: torch.zeros(len(hidden), VOCABULARY)  # noqa: E731
    monkeypatch.setattr(policy, "logits", flat)

    class Backwards(Support):
        def select(self, logits_BV):
            return torch.tensor([9, 4, 7, 2], dtype=torch.int32).expand(len(logits_BV), -1), None

    for support, best in ((FullVocabulary(), [0, 1, 2]), (Backwards(), [2, 4, 7])):
        rollout = sample(policy, support=support, candidates=3)
        ids = rollout.candidates_BTK[rollout.response_mask_BT]
        assert (ids[:, :3] == torch.tensor(best)).all()


@pytest.mark.parametrize(
    "support", [FullVocabulary(), TopK(5), Ragged()], ids=["full", "top5", "ragged"]
)
def test_the_trainer_scores_candidates_as_the_sampler_recorded_them(policy, support):
    whole = sample(policy, support=support, temperature=0.7, candidates=3)
    parts = sample(policy, support=support, temperature=0.7, candidates=3, batch_size=2 * G)
    assert torch.equal(whole.candidates_BTK, parts.candidates_BTK)
    torch.testing.assert_close(
        whole.candidate_logprobs_BTK, parts.candidate_logprobs_BTK, rtol=0, atol=1e-5
    )
    request = ScoreRequest(candidates=True)
    scored = policy.score(
        whole, whole.response_mask_BT, temperature=0.7, request=request
    ).candidate_logprobs_BTK
    assert not scored.requires_grad
    torch.testing.assert_close(scored, whole.candidate_logprobs_BTK, rtol=0, atol=1e-5)
