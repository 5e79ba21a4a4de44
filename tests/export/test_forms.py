"""Each form of an export holds the policy: it is loaded again and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.export import check_form, export, verify
from lightning_mpo.policies import CausalPolicy, Lora
from tests.support.exports import PROMPTS, SAMPLING, adapted


def state_of(policy: CausalPolicy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def logits_of(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=torch.tensor([[3, 7, 5, 2, 9]])).logits.float()


def test_adapters_are_loaded_by_peft_and_the_policy_comes_back_as_it_was(tiny_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = adapted(tiny_folder, dtype="bfloat16")
    before, mode = state_of(policy), policy.network.training
    check, notes = export(policy, tmp_path, "adapter", PROMPTS, sampling=SAMPLING)
    assert not check.problems
    assert not notes
    assert check.largest < 1e-4
    assert (check.same_texts, check.texts) == (3, 3)
    assert check.moved > 0.05
    assert abs(check.recovered - 1) < 1e-3
    after = state_of(policy)
    assert {name: value.dtype for name, value in after.items()} == {
        name: value.dtype for name, value in before.items()
    }
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert policy.network.training is mode
    network = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="bfloat16"), tmp_path
    )
    assert (
        f'from_pretrained("{Path(tiny_folder).name}", dtype="bfloat16")'
        in (tmp_path / "README.md").read_text()
    )
    with verify.in_float32(policy.network), verify.in_float32(network):
        torch.testing.assert_close(
            logits_of(network), logits_of(policy.network), rtol=1e-4, atol=1e-4
        )
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == tiny_folder
    )
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_base_plus_adapters_rounded_once(tiny_folder, tmp_path, base, dtype):
    from transformers import AutoModelForCausalLM

    policy = adapted(tiny_folder, dtype=base)
    check, (note,) = export(policy, tmp_path, "merged", PROMPTS, sampling=SAMPLING, dtype=dtype)
    assert not check.problems
    assert "the unquantised base plus the adapters" in note
    assert ("rounded to bfloat16" in note) == (dtype == "bfloat16")
    network = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert network.dtype == getattr(torch, dtype)
    own = policy.network.model.layers[1].mlp.up_proj
    delta = own.lora_B["default"].weight @ own.lora_A["default"].weight * 2
    expected = (own.base_layer.weight.float() + delta).to(getattr(torch, dtype))
    found = network.model.layers[1].mlp.up_proj.weight
    assert (found != expected).float().mean() < 1e-2, (
        "a sum at the edge of two roundings may fall otherwise"
    )
    torch.testing.assert_close(
        found, expected, rtol=1e-2 if dtype == "bfloat16" else 1e-6, atol=1e-6
    )
    assert check.largest < (1e-3 if dtype == "float32" else 0.5)


def test_an_adapted_head_is_untied_from_the_embedding(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = adapted(tiny_folder, lora=Lora(rank=4, alpha=8, targets=["lm_head", "q_proj"]))
    assert policy.config.get_text_config().tie_word_embeddings
    check, _ = export(policy, tmp_path, "merged", PROMPTS, sampling=SAMPLING, dtype="float32")
    assert not check.problems
    network = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(network.lm_head.weight, network.model.embed_tokens.weight)
    assert torch.equal(network.model.embed_tokens.weight, policy.network.model.embed_tokens.weight)


def test_all_weights_of_a_small_model(tiny_policy, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = tiny_policy()
    check, notes = export(policy, tmp_path, "full", PROMPTS, sampling=SAMPLING)
    assert not check.problems
    assert not notes
    assert check.moved is check.recovered is None
    assert check.largest < 1e-4
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(policy.network)
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("12+3")["input_ids"]
        == policy.tokenizer("12+3")["input_ids"]
    )


# --- a quantised base ---------------------------------------------------------------------------------------------------


def test_a_merge_for_a_quantised_base_is_checked_against_the_unquantised_one_and_warned_of(
    tiny_folder, tmp_path
):
    policy = adapted(tiny_folder)
    policy.quantization = "4-bit"
    with torch.no_grad():  # as quantisation would
        for name, weight in policy.named_parameters():
            if "base_layer" in name:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    check, (note,) = export(policy, tmp_path, "merged", PROMPTS, sampling=SAMPLING, dtype="float32")
    assert not check.problems
    assert check.largest < 1e-3
    assert "the policy was trained on a 4-bit base, from which they differ by" in note
    assert float(note.split("differ by ")[1].split()[0]) > 0.01


def test_a_base_that_is_only_there_quantised_is_refused(tiny_folder):
    policy = CausalPolicy(tiny_folder, lora=Lora())
    policy.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(
        UserError,
        match=r"is stored quantised, and adapters are only merged into unquantised weights: give",
    ):
        check_form(policy, "merged")
    check_form(policy, "adapter")


# --- forms and folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "form", "said"),
    [
        (
            None,
            "adapter",
            "the form 'adapter' needs adapters and the policy has no `policy.lora`: take the form 'full'",
        ),
        (None, "merged", "the form 'merged' needs adapters"),
        (
            Lora(),
            "full",
            "the form 'full' is for policies without `policy.lora`: take 'adapter', or 'merged'",
        ),
        (Lora(), "gguf", "the form must be one of adapter, merged, full, got 'gguf'"),
    ],
)
def test_forms_that_a_policy_does_not_have(tiny_folder, lora, form, said):
    with pytest.raises(UserError, match=said):
        check_form(CausalPolicy(tiny_folder, lora=lora), form)
