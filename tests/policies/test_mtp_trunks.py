"""Multi-token heads over adapters, quantised trunks and layers of other models."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy, Lora, ParallelHeads, SequentialHeads
from lightning_mpo.policies.packing import lay_out
from lightning_mpo.policies.trunk import Trunk, TrunkStates, record_norm_input
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import make_rollout
from tests.support.mtp import PROMPTS, REQUEST, RESPONSES, each_family, scramble


@each_family
def test_works_with_adapters_and_saves_what_is_trained(tiny_folder, family):
    policy = CausalPolicy(tiny_folder, lora=Lora(rank=2), dtype="bfloat16", mtp=family(offsets=2))
    policy.build(device=torch.device("cpu"), reference=True)
    assert all(weight.dtype == torch.float32 for weight in policy.mtp.parameters())
    rollout = make_rollout(PROMPTS, RESPONSES)
    request = ScoreRequest(future=2)
    scores = policy.score(rollout, rollout.response_mask_BT, temperature=1.0, request=request)
    scores.future_BTM.sum().backward()
    assert set(policy.parts()) == {"policy", "mtp"}
    kept = policy.trained_state(policy.state_dict())
    assert all("lora_" in key or key.startswith("mtp.") for key in kept)
    assert {key for key in kept if key.startswith("mtp.")} == {
        f"mtp.{key}" for key in policy.mtp.state_dict()
    }
    reference = policy.score(rollout, rollout.response_mask_BT, temperature=1.0, reference=True)
    assert reference.future_BTM is None


@each_family
def test_works_over_a_4_bit_trunk(tiny_policy, family):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    policy = tiny_policy(hidden_size=64)
    for module in list(policy.network.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                quantised = bitsandbytes.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    quant_type="nf4",
                    compute_dtype=torch.float32,
                )
                quantised.load_state_dict(child.state_dict())
                setattr(module, name, quantised.to("cpu"))
    policy.network.requires_grad_(False)
    heads = family(offsets=2)
    heads.build(Trunk(policy.decoder(), policy.config, policy.network.get_output_embeddings()))
    policy.mtp = heads
    rollout = make_rollout(PROMPTS, RESPONSES)
    scores = policy.score(
        rollout, rollout.response_mask_BT, temperature=1.0, request=ScoreRequest(future=2)
    )
    scores.future_BTM.sum().backward()
    assert torch.isfinite(scores.future_BTM).all()
    assert any(bool(weight.grad.any()) for weight in heads.parameters() if weight.grad is not None)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "model", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral"]
)
@pytest.mark.parametrize(
    "family", [ParallelHeads, SequentialHeads], ids=lambda family: family.family
)
def test_layers_of_the_trunks_own_class(model, family):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model, **SIZES)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    heads = family(offsets=2)
    heads.build(
        Trunk(
            network.get_decoder(), network.config.get_text_config(), network.get_output_embeddings()
        )
    )
    assert type(heads.layers[0]) is type(network.get_decoder().layers[0])
    rollout = make_rollout([5], [6, 6])
    lines = lay_out(rollout, share=False, hidden_size=32)
    with record_norm_input(network.get_decoder()) as before:
        after = network.get_decoder()(
            input_ids=lines.input_ids_RL, position_ids=lines.position_ids_RL, use_cache=False
        ).last_hidden_state
    states = TrunkStates(before[0], after, lines)
    for hidden in heads.hidden(states, 2):
        assert hidden.shape == after.shape
        if family is ParallelHeads:
            torch.testing.assert_close(hidden, after)
    scramble(heads, 0.1)
    hidden = list(heads.hidden(states, 2))
    sum(part.square().sum() for part in hidden).backward()
    unreached = [name for name, weight in heads.named_parameters() if weight.grad is None]
    assert not unreached
    cut = lay_out(make_rollout([5], [3, 3]), share=False, hidden_size=32)
    assert cut.input_ids_RL.shape[1] < lines.input_ids_RL.shape[1]
    if family is ParallelHeads:  # causal: a shorter line has the same hidden states
        width = 4
        with record_norm_input(network.get_decoder()) as before:
            short = network.get_decoder()(
                input_ids=lines.input_ids_RL[:, :width], use_cache=False
            ).last_hidden_state
        from dataclasses import replace

        short_lines = replace(
            lines,
            input_ids_RL=lines.input_ids_RL[:, :width],
            position_ids_RL=lines.position_ids_RL[:, :width],
        )
        for part, whole in zip(
            heads.hidden(TrunkStates(before[0], short, short_lines), 2), hidden, strict=True
        ):
            torch.testing.assert_close(part, whole[:, :width], rtol=1e-4, atol=1e-5)


def test_a_trunk_whose_layers_cannot_be_reached_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    network = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20))
    with pytest.raises(UserError, match="GPT2Model has no layers, norm, rotary_emb, embed_tokens"):
        Trunk(network.get_decoder(), network.config, network.get_output_embeddings())


@each_family
def test_checkpointing_changes_no_gradient(policy_with_heads, family):
    rollout = make_rollout(PROMPTS, RESPONSES)
    gradients = []
    for flag in (False, True):
        policy = policy_with_heads(family, options={"checkpointing": flag})
        policy.score(
            rollout, rollout.response_mask_BT, temperature=1.0, request=REQUEST
        ).future_BTM.sum().backward()
        gradients.append([weight.grad for weight in policy.parameters() if weight.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@each_family
def test_autocast_of_the_trainer_reaches_the_heads(tiny_policy, family):
    """`bf16-mixed` over a float32 base computes the heads' products in bfloat16, as it does the trunk's."""
    policy = tiny_policy(mtp=family(offsets=1))
    scramble(policy.mtp)
    seen = []
    product = next(module for module in policy.mtp.modules() if isinstance(module, torch.nn.Linear))
    product.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    rollout = make_rollout(PROMPTS, RESPONSES)
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            policy.score(
                rollout, rollout.response_mask_BT, temperature=1.0, request=ScoreRequest(future=1)
            )
    assert seen == [torch.float32, torch.bfloat16]
