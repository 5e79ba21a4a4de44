"""The tokens that the local sampler draws are those of a loop without its shortcuts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, Support, TopK
from lightning_mpo.types import PromptBatch
from tests.support.builders import END, VOCABULARY, make_prompts, seeded
from tests.support.sampled import PROMPTS, G, T, each_support, next_logits, responses, sample


def first_token_probabilities(policy, prompts: PromptBatch, temperature: float = 1.0) -> Tensor:
    ids = prompts.input_ids_PS[0][prompts.attention_mask_PS[0]].tolist()
    return (next_logits(policy, ids) / temperature).double().softmax(0)


def naive_sample(
    policy, prompts: PromptBatch, uniform: Tensor, support: Support, temperature: float
) -> list[list[int]]:
    """Draw one row at a time by inverse transform: the first token whose cumulative probability exceeds a uniform."""
    rows = []
    for b in range(len(uniform)):
        p = b // G
        prompt = prompts.input_ids_PS[p][prompts.attention_mask_PS[p]].tolist()
        response: list[int] = []
        while len(response) < uniform.shape[1] and (not response or response[-1] != END):
            logits = next_logits(policy, prompt + response) / temperature
            ids = list(range(VOCABULARY))
            if isinstance(support, TopK):
                ids = sorted(ids, key=lambda v, logits=logits: -logits[v].item())[: support.k]
            probabilities = logits[ids].double().softmax(0).tolist()
            u, total, chosen = uniform[b, len(response)].item(), 0.0, ids[-1]
            for token, probability in zip(ids, probabilities, strict=True):
                total += probability
                if total > u:
                    chosen = token
                    break
            response.append(chosen)
        rows.append(response)
    return rows


@each_support
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_those_of_a_loop_without_cache_padding_or_sharing(policy, support, temperature):
    rollout = sample(policy, support=support, temperature=temperature)
    uniform = torch.rand(len(PROMPTS) * G, T, generator=seeded(0))
    assert responses(rollout) == naive_sample(
        policy, make_prompts(PROMPTS), uniform, support, temperature
    )
    if support.__class__ is FullVocabulary:
        assert (
            len({len(row) for row in responses(rollout)}) > 3
        )  # rows did leave the batch at different times


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("k", [None, 4])
def test_first_tokens_have_the_frequencies_of_the_softmax(policy, k, temperature):
    """Pearson's chi-square stays within 5 standard deviations of its expectation, and nothing leaves the support."""
    prompts, n = make_prompts([5]), 6000
    support = FullVocabulary() if k is None else TopK(k)
    rollout = sample(policy, prompts, n, support=support, temperature=temperature, max_new_tokens=1)
    expected = first_token_probabilities(policy, prompts, temperature)
    if k is not None:
        outside = expected.argsort(descending=True)[k:]
        expected[outside] = 0
        expected = expected / expected.sum()
    counts = torch.bincount(rollout.responses_BT[:, 0], minlength=VOCABULARY).double()
    assert not counts[expected == 0].any()
    likely = expected * n >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    predicted = torch.cat([expected[likely], expected[~likely].sum()[None]]) * n
    keep = predicted > 0
    chi_square = ((observed - predicted)[keep].square() / predicted[keep]).sum().item()
    freedom = int(keep.sum()) - 1
    assert freedom >= 2
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_a_token_of_probability_zero_is_never_drawn(policy, monkeypatch):
    """Also not by a uniform number of exactly 0 or of almost 1, with impossible tokens at both ends."""

    def edges(*shape, generator):
        return torch.tensor([0.0, 1 - 2**-24]).expand(*shape[:-1], shape[-1] // 2, 2).reshape(shape)

    logits = torch.zeros(VOCABULARY)
    logits[[0, 1, 2, -1]] = -torch.inf
    monkeypatch.setattr(torch, "rand", edges)
    monkeypatch.setattr(
        policy, "logits", lambda hidden, reference: logits.expand(len(hidden), -1).clone()
    )
    rollout = sample(policy)
    assert responses(rollout) == [[3, VOCABULARY - 2] * (T // 2)] * (len(PROMPTS) * G)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"support": TopK(3)}])
def test_weights_that_are_no_numbers_are_named(tiny_policy, value, options):
    broken = tiny_policy()
    with torch.no_grad():
        broken.network.model.layers[0].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(
        UserError, match="gives no probabilities, only nan: its weights are nan or infinite"
    ):
        sample(broken, **options)


def test_greedy_takes_what_generate_takes(policy):
    prompts = make_prompts(PROMPTS)
    rollout = sample(policy, prompts, 1, greedy=True, temperature=0.7)
    policy.eval()
    expected = policy.network.generate(
        input_ids=prompts.input_ids_PS,
        attention_mask=prompts.attention_mask_PS.long(),
        do_sample=False,
        max_new_tokens=T,
        pad_token_id=0,
        eos_token_id=END,
    )
    policy.train()
    width = rollout.tokens_BL.shape[1]
    assert torch.equal(rollout.tokens_BL, expected[:, :width])
    assert not (expected[:, width:] != 0).any()


def test_greedy_inside_a_support_is_plain_greedy(policy):
    one, other = (
        sample(policy, greedy=True, support=support) for support in (FullVocabulary(), TopK(3))
    )
    assert torch.equal(one.tokens_BL, other.tokens_BL)


def test_the_generator_is_all_the_randomness_there_is(policy):
    torch.manual_seed(1)
    one = sample(policy, generator=seeded(7))
    torch.manual_seed(2)
    assert torch.equal(sample(policy, generator=seeded(7)).tokens_BL, one.tokens_BL)
    assert responses(sample(policy, generator=seeded(8))) != responses(one)
