"""Options in a model folder are read: end tokens, positions, dropouts, tokens without an embedding."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.data import PromptFile
from lightning_mpo.errors import UserError
from lightning_mpo.export import export
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.fitting import check_fit
from lightning_mpo.policies import CausalPolicy, TinyPolicy
from lightning_mpo.policies.loading import positions_of
from lightning_mpo.policies.packing import lay_out
from lightning_mpo.types import Splits
from tests.support.builders import make_prompts, make_rollout
from tests.support.runs import Digits, make_data, make_objective, sgd

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
}
FAMILIES = {
    "LlamaConfig": SIZES | {"intermediate_size": 64, "attention_dropout": 0.1},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 48},
    "OPTConfig": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "GPTNeoXConfig": SIZES | {"intermediate_size": 64, "hidden_dropout": 0.1},
}


def write_family(folder: Path, name: str) -> None:
    """Write an untrained model of a family with a tokenizer of characters."""
    import transformers

    config = getattr(transformers, name)(
        vocab_size=19, bos_token_id=None, eos_token_id=1, pad_token_id=0, **FAMILIES[name]
    )
    network = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 2:
                weight.mul_(6.0)
    network.save_pretrained(folder)
    TinyPolicy("0123456789+-*=;, ").tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_as_shipped_trains_and_is_exported(tmp_path, name):
    """GPT-2 has 48 positions here: prompts of 7 tokens packed with 3 responses of 30 are wider than that."""
    write_family(tmp_path / "model", name)
    policy = CausalPolicy(str(tmp_path / "model"))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=1, num_sanity_val_steps=0,
        callbacks=[RolloutLoop([Digits()], prompts=2, completions=3, max_new_tokens=30)],
    )  # fmt: skip
    trainer.fit(
        PolicyOptimization(policy, make_objective(), optimizer=sgd()),
        datamodule=make_data(digits=2),
    )
    assert trainer.global_step == 1
    assert policy.positions == 48
    check, _ = export(policy, tmp_path / "out", "full", make_prompts([5, 3, 4]))
    assert not check.problems
    with pytest.raises(
        UserError,
        match=r"has 6 tokens and `rollout.max_new_tokens` is 43, together more than the model's 48",
    ):
        check_fit(policy, *prompts_of(policy, "12+34="), 43)


def prompts_of(policy, *prompts: str):
    data = make_data()
    rows = [replace(data.splits.train[0], prompt=prompt) for prompt in prompts]
    data._splits = Splits(rows, rows)
    data.connect(policy.tokenizer)
    return data, rows


@pytest.mark.parametrize(("limit", "fits"), [(42, True), (43, False), (10**9, False)])
def test_prompt_and_response_must_fit_the_positions(limit, fits):
    policy = TinyPolicy("0123456789+-*=;, ", max_length=48)
    data, rows = prompts_of(policy, "1+1=", "12+34=", "1=")
    if fits:
        check_fit(policy, data, rows, limit)
        return
    with pytest.raises(
        UserError,
        match=rf"longest prompt has 6 tokens and `rollout.max_new_tokens` is {limit},.*at most 42",
    ):
        check_fit(policy, data, rows, limit)


def test_a_prompt_that_fills_the_positions_alone():
    policy = TinyPolicy("0123456789+-*=;, ", max_length=8)
    with pytest.raises(UserError, match="model's 8 positions: drop long prompts"):
        check_fit(policy, *prompts_of(policy, "1+1+1+1+1="), 1)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 128),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            256,
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 16,
                }
            },
            64,
        ),
        ({"sliding_window": 8}, 64),
    ],
)
def test_scaled_positions_count_and_windows_do_not(entries, expected):
    from transformers import MistralConfig

    assert positions_of(MistralConfig(max_position_embeddings=64, **entries)) == expected


def test_a_model_without_positions_has_no_limit():
    from transformers import BloomConfig

    assert positions_of(BloomConfig()) is None


def test_padding_of_packed_lines_is_at_position_0():
    rollout = make_rollout([5, 3], [6, 6, 2, 2])
    lines = lay_out(rollout, share=True, hidden_size=10_000)
    assert lines.shared
    assert int(lines.position_ids_RL[lines.segment_RL == -1].max()) == 0
    assert int(lines.position_ids_RL.max()) <= 5 + 6


# --- end tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def say(folder: Path, file: str, **entries: object) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (1, [2, 1], [1, 2]),
        (1, 2, [1, 2]),
        ([3, 1], None, [1, 3]),
        (None, [4], [1, 4]),
        (1, [], [1]),
        (1, 1, [1]),
    ],
)
def test_end_tokens_of_all_three_places_end_a_response(folder, config, generation, ends):
    say(folder, "config.json", eos_token_id=config)
    say(folder, "generation_config.json", eos_token_id=generation)
    policy = CausalPolicy(str(folder))
    policy.check()
    assert policy.end_tokens == ends
    assert all(f"({end})" in policy.remarks[0] for end in ends)


@pytest.mark.parametrize("end", ["x", 1.5, -1, 19, 10**9, True, [2, 99], [None], [[1]]])
def test_end_tokens_that_are_none(folder, end):
    say(folder, "generation_config.json", eos_token_id=end)
    if end == [None]:
        assert CausalPolicy(str(folder)).end_tokens == [1]
        return
    with pytest.raises(
        UserError,
        match="generation_config.json names the end token .*none of the model's 19 tokens",
    ):
        CausalPolicy(str(folder)).check()


def test_no_end_token_at_all(folder):
    for file in ("config.json", "generation_config.json"):
        say(folder, file, eos_token_id=None)
    say(folder, "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="names no token that ends a response: set `eos_token`"):
        CausalPolicy(str(folder)).check()


@pytest.mark.parametrize("pad", ["<end>", None])
def test_a_pad_token_that_is_the_end_token_or_none_hides_no_end(folder, pad):
    say(folder, "tokenizer_config.json", pad_token=pad)
    say(folder, "config.json", pad_token_id=None if pad is None else 1)
    policy = CausalPolicy(str(folder))
    assert policy.end_tokens == [1]
    policy.build(device=torch.device("cpu"), reference=False)
    with torch.no_grad():  # the end token is most probable everywhere
        policy.network.get_input_embeddings().weight.zero_()
        policy.network.get_input_embeddings().weight[1] = 1.0
        policy.network.model.norm.weight.fill_(5.0)
        for layer in policy.network.model.layers:
            layer.mlp.down_proj.weight.zero_()
    from lightning_mpo.objective.supports import FullVocabulary
    from lightning_mpo.sampling import LocalSampler, SamplingRequest

    prompts = replace(make_prompts([2, 3]), input_ids_PS=torch.ones(2, 3, dtype=torch.long))
    rollout = LocalSampler().sample(
        policy, prompts, 1, SamplingRequest(FullVocabulary(), 1.0, 4, greedy=True),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert rollout.response_mask_BT.sum(1).tolist() == [1, 1], (
        "the end token belongs to the response"
    )
    assert rollout.finish_B.tolist() == [0, 0]


# --- tokens without an embedding ----------------------------------------------------------------------------------------


def test_a_token_without_an_embedding_is_refused_where_a_prompt_holds_it(folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<x>", "<y>"])
    tokenizer.save_pretrained(folder)
    policy = CausalPolicy(str(folder))
    policy.check()
    assert policy.unembedded == {"<x>": 19, "<y>": 20}
    assert "2 of the tokenizer have no embedding ('<x>', say)" in policy.remarks[-1]
    for prompt, fits in (("1+1=", True), ("1<y>1=", False)):
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}))
        data = PromptFile(str(tmp_path / "prompts.jsonl"), control_tokens=True)
        data.connect(policy.tokenizer)
        if fits:
            check_fit(policy, data, data.splits.train, 5)
            continue
        with pytest.raises(
            UserError, match=r"'1<y>1=' holds the token '<y>' \(20\).* for 19 tokens only"
        ):
            check_fit(policy, data, data.splits.train, 5)


# --- dropouts and the gate ----------------------------------------------------------------------------------------------


def test_dropouts_of_a_model_are_0_and_said(folder):
    say(folder, "config.json", attention_dropout=0.3)
    policy = CausalPolicy(str(folder))
    policy.build(device=torch.device("cpu"), reference=False)
    assert policy.network.config.attention_dropout == 0
    assert policy.network.model.layers[0].self_attn.attention_dropout == 0
    assert "dropout    attention_dropout of the model set to 0" in policy.remarks[1]
    assert CausalPolicy(str(folder)).remarks[1:] == policy.remarks[1:]
