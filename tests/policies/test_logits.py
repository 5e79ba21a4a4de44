"""Factors, soft caps and biases of real families; heads that do anything else are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy
from tests.support.builders import VOCABULARY, make_rollout

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},
}


def build(family: str, **options) -> TinyPolicy:
    """Return a policy on a random model of a family, with a head of some size and, where there is one, a bias."""
    policy = TinyPolicy("0123456789+-*=;, ")
    policy.__dict__["config"] = AutoConfig.for_model(family, **SIZES, **options)

    def load():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = AutoModelForCausalLM.from_config(policy.config)
            head = network.get_output_embeddings()
            with torch.no_grad():
                head.weight.normal_(std=1.0)
                if head.bias is not None:
                    head.bias.normal_(std=1.0)
        return network

    policy.load_network = load
    policy.build(device=torch.device("cpu"), reference=False)
    return policy


@pytest.mark.parametrize("support", [None, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_samples_are_of_the_family_s_own_logits(family, support):
    policy = build(family, **FAMILIES[family])
    rollout = make_rollout([6, 4], [5, 2, 3, 1], support=support)
    one = rollout.attention_mask_BL[0]
    row = rollout.tokens_BL[0][one]
    with torch.no_grad():
        scored = policy.score(rollout, rollout.response_mask_BT, temperature=0.7).logprobs_BT[0, :5]
        own = policy.network.eval()(input_ids=row[None]).logits[0] / 0.7
        hidden = policy.decoder()(input_ids=row[None]).last_hidden_state[0]
    torch.testing.assert_close(policy.logits(hidden) / 0.7, own)
    if support is not None:
        outside = torch.ones(5, VOCABULARY, dtype=torch.bool).scatter(
            1, rollout.support_BTK[0, :5].long(), False
        )
        own[-6:-1] = own[-6:-1].masked_fill(outside, -torch.inf)
    expected = own.log_softmax(-1)[-6:-1].gather(1, row[-5:, None])[:, 0]
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-4)


def test_the_families_of_the_list_have_something_to_know():
    options = {family: build(family, **FAMILIES[family]).head_options for family in FAMILIES}
    assert options["gemma2"] == {"scale": 1.0, "softcap": 3.0}
    assert options["granite"] == {"scale": 0.25, "softcap": None}
    assert options["cohere"] == {"scale": 0.25, "softcap": None}
    assert options["llama"] == {"scale": 1.0, "softcap": None}


def test_a_head_that_does_something_else_is_refused():
    with pytest.raises(
        UserError, match=r"the logits of `HyperCLOVAXForCausalLM` are not cap\(scale"
    ):
        build("hyperclovax", logits_scaling=4.0)  # multiplies by what Granite divides by
    build("hyperclovax", logits_scaling=1.0)


def test_a_factor_that_is_not_known_is_refused_before_weights_are_loaded(monkeypatch):
    policy = TinyPolicy("0123456789")
    monkeypatch.setattr(policy, "load_network", None)
    policy.check()
    policy.config.output_multiplier = 1.0
    policy.check()
    policy.config.output_multiplier = 0.5
    with pytest.raises(
        UserError, match=r"models of type 'llama' scale their logits by `output_multiplier` \(0.5\)"
    ):
        policy.check()
