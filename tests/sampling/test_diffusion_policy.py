"""The diffusion sampler with a network: a small BERT, learned positions, prompts of several lengths."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.objective.supports import FullVocabulary, Nucleus, TopK
from lightning_mpo.rollout.parity import ParityError, check_parity
from tests.support.revealed import BLOCK, PROMPTS, G, T, reveal

SUPPORTS = [FullVocabulary(), TopK(4), Nucleus(0.8, 6)]


@pytest.fixture(scope="module")
def policy(tiny_masked):
    return tiny_masked(reference=True)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("remasking", ["low_confidence", "random", "entropy"])
def test_sampler_and_trainer_agree(policy, support, remasking):
    rollout = reveal(
        policy, support=support, remasking=remasking, temperature=0.8, tokens_per_step=2
    )
    assert check_parity(policy, rollout, temperature=0.8, exact=True).max < 1e-4
    with pytest.raises(ParityError, match=r"the sampler used temperature 0.8, the trainer 1.5"):
        check_parity(policy, rollout, temperature=1.5, exact=True)


def test_the_first_tokens_are_those_of_the_plain_network(policy):
    """Log-probs of the first step are those of the network on prompt and MASK, without padding."""
    rollout = reveal(policy, temperature=0.7)
    S, network = rollout.prompt_length, policy.network.eval()
    for b in range(len(PROMPTS) * G):
        prompt = rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]]
        ids = torch.cat([prompt, torch.full((T,), policy.mask_id)])[None]
        t = rollout.reveal_BT[b].tolist().index(0)
        with torch.no_grad():
            logits = network(input_ids=ids).logits[0, len(prompt) + t].double() / 0.7
        logits[list(policy.barred)] = -torch.inf
        token = int(rollout.responses_BT[b, t])
        logprob = float(rollout.behaviour_logprobs_BT[b, t])
        assert logprob == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"support": TopK(6), "temperature": 3.0}])
def test_mask_and_padding_are_neither_drawn_nor_kept(policy, options):
    rollout = reveal(policy, completions=8, **options)
    barred = torch.tensor(policy.barred)
    assert len(barred) == 2
    assert not torch.isin(rollout.responses_BT, barred).any()
    if rollout.support_BTK is not None:
        assert not torch.isin(rollout.support_BTK, barred.int()).any()


def test_greedy_rows_repeat_and_modes_are_restored(policy):
    policy.train()
    rollout = reveal(policy, greedy=True, block=BLOCK)
    assert policy.training
    for start in range(0, len(rollout.rows), G):
        rows = rollout.responses_BT[start : start + G].tolist()
        assert rows == [rows[0]] * G
    policy.eval()
