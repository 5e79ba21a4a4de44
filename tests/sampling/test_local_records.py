"""Log-probs, supports, ends and texts that the local sampler records."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.objective.supports import Nucleus, TopK
from lightning_mpo.policies import CausalPolicy, Lora
from lightning_mpo.types import Finish
from tests.support.builders import END, make_prompts, seeded
from tests.support.sampled import (
    PROMPTS,
    G,
    Ragged,
    T,
    each_support,
    next_logits,
    responses,
    sample,
)


def lora_policy(folder: str) -> CausalPolicy:
    policy = CausalPolicy(folder, lora=Lora(rank=4))
    policy.build(device=torch.device("cpu"), reference=True)
    return policy


@each_support
@pytest.mark.parametrize(
    ("temperature", "greedy"), [(1.0, False), (0.6, False), (1.5, False), (0.8, True)]
)
def test_recorded_logprobs_are_those_of_the_trainer(policy, support, temperature, greedy):
    rollout = sample(policy, support=support, temperature=temperature, greedy=greedy)
    mask = rollout.response_mask_BT
    with torch.no_grad():
        scored = policy.score(rollout, mask, temperature=temperature).logprobs_BT
    assert rollout.behaviour_logprobs_BT.dtype == torch.float32
    torch.testing.assert_close(rollout.behaviour_logprobs_BT, scored, rtol=0, atol=1e-5)
    assert not rollout.behaviour_logprobs_BT[~mask].any()


def test_the_support_of_every_step_is_recorded_with_its_mass(policy):
    rollout = sample(policy, support=TopK(5), temperature=0.7)
    prompts = make_prompts(PROMPTS)
    for b, response in enumerate(responses(rollout)):
        prompt = prompts.input_ids_PS[b // G][prompts.attention_mask_PS[b // G]].tolist()
        for t, token in enumerate(response):
            probabilities = (next_logits(policy, prompt + response[:t]) / 0.7).softmax(0)
            best = probabilities.topk(5)
            assert rollout.support_BTK[b, t].tolist() == best.indices.tolist()
            assert token in best.indices
            assert rollout.kept_mass_BT[b, t].item() == pytest.approx(
                best.values.sum().item(), abs=1e-5
            )
    assert rollout.support_BTK.dtype == torch.int32
    full = sample(policy)
    assert full.support_BTK is None
    assert full.support_mask_BTK is None
    assert full.kept_mass_BT is None


@pytest.fixture(params=["copy", "adapters"])
def drifted(request, tiny_policy, tiny_folder):
    """A policy that has left its reference, which is a copy or the base with adapters off."""
    policy = tiny_policy(reference=True) if request.param == "copy" else lora_policy(tiny_folder)
    moved = policy.network.parameters() if request.param == "copy" else policy.parts()["policy"]
    with torch.no_grad():
        for weight in moved:
            weight.add_(0.3 * torch.randn(weight.shape, generator=seeded(1)))
    return policy


@pytest.mark.parametrize(
    "support", [TopK(5, from_reference=True), Nucleus(0.9, 6, from_reference=True)]
)
def test_a_support_of_the_reference_holds_its_most_probable_tokens(drifted, support):
    rollout = sample(drifted, support=support, temperature=0.7)
    prompts, elsewhere = make_prompts(PROMPTS), 0
    for b, response in enumerate(responses(rollout)):
        prompt = prompts.input_ids_PS[b // G][prompts.attention_mask_PS[b // G]].tolist()
        for t in range(len(response)):
            with drifted.as_reference():
                network = drifted.reference_network or drifted.network
                ranks = (
                    network(input_ids=torch.tensor([prompt + response[:t]])).logits[0, -1:].detach()
                    / 0.7
                )
            support_BK, support_mask_BK = support.select(ranks)
            assert rollout.support_BTK[b, t].tolist() == support_BK[0].tolist()
            if support_mask_BK is not None:
                assert rollout.support_mask_BTK[b, t].tolist() == support_mask_BK[0].tolist()
            own = (next_logits(drifted, prompt + response[:t]) / 0.7).softmax(0)
            inside = support_BK[0] if support_mask_BK is None else support_BK[0][support_mask_BK[0]]
            assert rollout.kept_mass_BT[b, t].item() == pytest.approx(
                own[inside.long()].sum().item(), abs=1e-5
            )
            elsewhere += set(own.topk(len(inside)).indices.tolist()) != set(inside.tolist())
    assert elsewhere > 10  # the policy itself would have chosen other sets
    with torch.no_grad():
        scored = drifted.score(rollout, rollout.response_mask_BT, temperature=0.7).logprobs_BT
    torch.testing.assert_close(rollout.behaviour_logprobs_BT, scored, rtol=0, atol=1e-5)


def test_supports_with_empty_slots_are_never_left_and_replayed(policy):
    rollout = sample(policy, support=Ragged())
    mask = rollout.response_mask_BT
    assert rollout.support_mask_BTK.shape == rollout.support_BTK.shape
    hits = (rollout.support_BTK == rollout.responses_BT[..., None]) & rollout.support_mask_BTK
    assert torch.equal(hits.any(-1), mask)
    with torch.no_grad():
        scored = policy.score(rollout, mask, temperature=1.0).logprobs_BT
    torch.testing.assert_close(rollout.behaviour_logprobs_BT, scored, rtol=0, atol=1e-5)


def test_rows_stop_at_the_end_token_and_say_so(policy):
    rollout = sample(policy)
    finishes = set()
    for row, mask, response, finish in zip(
        rollout.responses_BT,
        rollout.response_mask_BT,
        responses(rollout),
        rollout.finish_B.tolist(),
        strict=True,
    ):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # no gap
        assert not row[~mask].any()
        assert END not in response[:-1]
        assert finish == (Finish.STOP if response[-1] == END else Finish.LENGTH)
        if finish == Finish.LENGTH:
            assert len(response) == T
        finishes.add(finish)
    assert finishes == {Finish.STOP, Finish.LENGTH}


def test_responses_go_on_behind_end_tokens_that_are_ignored(policy):
    plain, endless = sample(policy), sample(policy, ignore_end_tokens=True)
    assert (plain.finish_B == Finish.STOP).any()
    assert endless.response_mask_BT.all()
    assert (endless.finish_B == Finish.LENGTH).all()
    for short, long in zip(responses(plain), responses(endless), strict=True):
        assert len(long) == T
        assert long[: len(short)] == short


def test_groups_are_neighbours_and_texts_are_the_tokens_without_the_end(policy):
    prompts = make_prompts(PROMPTS)
    rollout = sample(policy, prompts)
    S = prompts.input_ids_PS.shape[1]
    assert rollout.prompt_length == S
    assert rollout.group_B.tolist() == [p for p in range(len(PROMPTS)) for _ in range(G)]
    assert torch.equal(rollout.tokens_BL[:, :S], prompts.input_ids_PS.repeat_interleave(G, 0))
    expected_mask = torch.cat(
        [prompts.attention_mask_PS.repeat_interleave(G, 0), rollout.response_mask_BT], 1
    )
    assert torch.equal(rollout.attention_mask_BL, expected_mask)
    assert [row.prompt for row in rollout.rows] == [
        str(p) for p in range(len(PROMPTS)) for _ in range(G)
    ]
    alphabet = policy.characters
    for text, response in zip(rollout.texts, responses(rollout), strict=True):
        assert text == "".join(alphabet[token - 2] for token in response if token >= 2)
    assert len(set(rollout.texts)) > 1
