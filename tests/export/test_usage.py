"""Generation options, heads and sampling of a policy stand beside its weights."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_mpo.export import Origin, Sampling, export
from lightning_mpo.export.usage import Usage, usage_of
from lightning_mpo.objective.supports import AllowedTokens, FullVocabulary, MinP, TopK
from lightning_mpo.policies import CausalPolicy, Lora, ParallelHeads
from lightning_mpo.policies.checkpoints import HEADS, read_safetensors
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import make_prompts, make_rollout
from tests.support.code_corpus import tiny
from tests.support.exports import PROMPTS, SAMPLING, TEMPERATURE, adapted


@pytest.mark.parametrize(
    ("support", "top_k", "whole"),
    [
        (FullVocabulary(), 0, True),
        (TopK(8), 8, True),
        (TopK(8, from_reference=True), 0, False),
        (MinP(), 0, False),
        (AllowedTokens(without="0"), 0, True),
        (TopK(3, within=AllowedTokens(without="0")), 3, True),
    ],
)
def test_generation_is_that_of_training(tiny_policy, tmp_path, support, top_k, whole):
    from transformers import GenerationConfig

    from lightning_mpo.export.folder import generation_config

    sampling = Sampling(0.7, 30, support)
    generation_config(tiny_policy(), sampling).save_pretrained(tmp_path)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert (found.temperature, found.max_new_tokens, found.do_sample) == (0.7, 30, True)
    assert (found.top_k, found.top_p, found.eos_token_id, found.pad_token_id) == (
        top_k,
        1.0,
        [1],
        0,
    )
    assert sampling.is_complete is whole
    zero = [i for i, text in enumerate(tiny_policy().token_texts) if "0" in text]
    assert found.suppress_tokens == (zero if support.fixed.bars else None)
    assert len(zero) == 1
    assert found.stop_strings is None


def test_texts_that_stop_and_barred_ids_hold_in_generate(tmp_path):
    """As in training: a text ends a response with its first token that contains it."""
    policy = tiny()
    torch.manual_seed(0)
    policy.build(device=torch.device("cpu"), reference=False)
    sampling = Sampling(1.0, 60, AllowedTokens(without="0123"), None, ("+", 5))
    prompts = make_prompts([5, 3])
    check, _ = export(policy, tmp_path / "out", "full", prompts, sampling=sampling)
    assert not check.problems, "the comparison is of the network, without these options"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'in training one also ended with "+" or 5.' in card
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer(["x=", "y="] * 20, return_tensors="pt")
    torch.manual_seed(0)
    ids = network.generate(**prompt, tokenizer=tokenizer)[:, 2:]
    texts = ["".join(policy.token_texts[i] for i in row) for row in ids.tolist()]
    assert not set("".join(texts)) & set("0123")
    bodies = [text.partition("<pad>")[0] for text in texts]
    assert any(body.endswith("+") for body in bodies)
    assert not any("+" in body[:-1] for body in bodies)
    # evaluations have rules of their own: `CausalPolicy` reads end tokens alone
    reread = CausalPolicy(str(tmp_path / "out"))
    assert (reread.end_tokens, reread.fixed_bar) == (policy.end_tokens, ())


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=8)])
def test_heads_are_loaded_again(tiny_folder, tmp_path, lora):
    def heads(**options) -> ParallelHeads:
        return ParallelHeads(offsets=2, **options)

    policy = (
        adapted(tiny_folder, lora=lora, mtp=heads())
        if lora
        else CausalPolicy(tiny_folder, mtp=heads())
    )
    policy.build(device=torch.device("cpu"), reference=False)
    with torch.no_grad():
        for weight in policy.mtp.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    check, _ = export(policy, tmp_path, "adapter" if lora else "full", PROMPTS, sampling=SAMPLING)
    assert not check.problems
    described = json.loads((tmp_path / "mtp_heads.json").read_text())
    assert described["class_path"] == "lightning_mpo.policies.ParallelHeads"
    assert described["heads"] == policy.describe_heads()
    assert read_safetensors(tmp_path / HEADS, "it").keys() == policy.mtp.state_dict().keys()
    again = (
        CausalPolicy(tiny_folder, lora=lora, mtp=heads(), checkpoint=str(tmp_path))
        if lora
        else CausalPolicy(str(tmp_path), mtp=heads(weights_file=str(tmp_path / HEADS)))
    )
    again.check()
    again.build(device=torch.device("cpu"), reference=False)
    assert "mtp" not in again.cold_parts
    rollout = make_rollout([4, 3], [5, 4, 3, 5])
    said = [
        p.score(rollout, rollout.response_mask_BT, temperature=1.0, request=ScoreRequest(future=2))
        for p in (policy, again)
    ]
    torch.testing.assert_close(said[0].future_BTM, said[1].future_BTM, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said[0].logprobs_BT, said[1].logprobs_BT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["adapter", "merged", "full"])
def test_how_a_folder_is_used_stands_beside_the_weights_as_data(tiny_folder, tmp_path, form):
    lora = {} if form == "full" else {"lora": Lora(rank=4, alpha=8, targets=["q_proj"])}
    policy = CausalPolicy(tiny_folder, **lora)
    policy.build(device=torch.device("cpu"), reference=False)
    data = Mock(
        control_tokens=None,
        instruction="Add: ",
        chat_template=False,
        max_prompt_tokens=99,
        system=None,
        suffix="",
        template_arguments=None,
    )
    export(
        policy,
        tmp_path,
        form,
        PROMPTS,
        sampling=SAMPLING,
        data=data,
        origin=Origin({"seed_everything": 5}),
    )
    assert not list(tmp_path.glob("*.yaml"))
    usage = Usage.read(tmp_path)
    assert (usage.form, usage.temperature, usage.max_new_tokens, usage.seed) == (
        form,
        TEMPERATURE,
        30,
        5,
    )
    assert usage.dtype == ("bfloat16" if form == "merged" else "float32")
    assert usage.prompt["instruction"] == "Add: "
    assert usage.prompt["chat_template"] is False
    again = usage.policy(str(tmp_path))
    if form == "adapter":
        assert (again.source, again.checkpoint, again.lora) == (
            tiny_folder,
            str(tmp_path),
            policy.lora,
        )
        assert usage.policy(str(tmp_path), "other").source == "other"
    else:
        assert (again.source, again.checkpoint, again.lora) == (str(tmp_path), None, None)


def test_examples_of_prompts_are_not_part_of_an_export(tiny_policy):
    data = Mock(spec=["few_shot"], few_shot=2)
    with pytest.warns(UserWarning, match="the export does not hold the 2 examples"):
        usage_of(tiny_policy(), "full", SAMPLING, data, 0, "float32")
