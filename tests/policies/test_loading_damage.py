"""Damaged model folders are refused in one line, before a model is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_mpo.policies.weight_files import LAYERS
from tests.support.model_folders import Edit, entry, in_place, index, refused, tensors


def text(file: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / file).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def gone(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def cut(file: str, size: int) -> Edit:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


NO_JSON = "cannot be read as JSON"
HUGE = [
    (f"`{name}` of config.json is {number}, too many", entry("config.json", **{name: number}))
    for name in (
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "head_dim",
    )
    for number in (10**9, 10**30)
]
WRONG_TYPE = [
    (f"cannot be loaded: Validation error for field '{name}'", entry("config.json", **{name: value}))
    for name in ("num_hidden_layers", "vocab_size", "hidden_size", "max_position_embeddings")
    for value in ("x", None, 1.5, [1], {}, True)
]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "edit"),
    [
        *HUGE,
        *WRONG_TYPE,
        ("`num_hidden_layers` of config.json is 0; it must be at least 1", entry("config.json", num_hidden_layers=0)),
        ("`num_hidden_layers` of config.json is -1; it must be", entry("config.json", num_hidden_layers=-1)),
        ("`vocab_size` of config.json is 0; it must be at least 1", entry("config.json", vocab_size=0)),
        ("'model.layers.1.", entry("config.json", num_hidden_layers=1)),
        ("lack 9 tensors, which would be random numbers", entry("config.json", num_hidden_layers=3)),
        ("'model.embed_tokens.weight' is [20, 32] by the description and [19, 32] in", entry("config.json", vocab_size=20)),
        ("negative dimension", entry("config.json", intermediate_size=-1)),
        ("`max_position_embeddings` of config.json is -1; it", entry("config.json", max_position_embeddings=-1)),
        ("`max_position_embeddings` of config.json is 1000000000000, too many",
         entry("config.json", max_position_embeddings=10**12)),
        ("lack 1 tensors, which would be random numbers: 'lm_head.weight'",
         entry("config.json", tie_word_embeddings=False)),
        ("does not recognize this architecture", entry("config.json", model_type="evil")),
        ("Should have a `model_type`", text("config.json", "{}")),
        ("Unrecognized configuration class", entry("config.json", model_type="t5")),
        ("describes cannot be loaded: 'evil'", entry("config.json", hidden_act="evil")),
        ("rope_parameters", entry("config.json", rope_parameters="x")),
        ("cannot be loaded", entry("config.json", quantization_config=5)),
        ("are stored quantised (evil,", entry("config.json", quantization_config={"quant_method": "evil"})),
        (NO_JSON, cut("config.json", 50)),
        (NO_JSON, text("config.json", "")),
        (NO_JSON, text("config.json", b"\xff\xfe")),
        (NO_JSON, text("config.json", "[" * 100_000)),
        ("config.json must hold an object, got list", text("config.json", "[]")),
        ("has no config.json", in_place("config.json", Path.mkdir)),
        ("has no config.json", in_place("config.json", lambda path: path.symlink_to("/dev/zero"))),
        ("tokenizer_config.json is missing, or not", in_place("tokenizer_config.json", lambda p: p.symlink_to("/dev/zero"))),
        ("tokenizer_config.json is missing, or not", in_place("tokenizer_config.json", os.mkfifo)),
        ("tokenizer_config.json is missing, or not", in_place("tokenizer_config.json", lambda p: p.symlink_to("gone"))),
        ("tokenizer_config.json must hold an object", text("tokenizer_config.json", "[]")),
        (f"generation_config.json {NO_JSON}", text("generation_config.json", "{")),
        ("the tokenizer of the model 'model' cannot be loaded: Couldn't instantiate", gone("tokenizer.json")),
        ("the tokenizer of the model 'model' cannot be loaded", cut("tokenizer.json", 80)),
        ("the tokenizer of the model 'model' cannot be loaded", text("tokenizer.json", "{}")),
        ("the tokenizer of the model 'model' cannot be loaded", text("tokenizer.json", "[]")),
        ("the tokenizer of the model 'model' cannot be loaded", entry("tokenizer_config.json", eos_token=5)),
        ("the tokenizer of the model 'model' cannot be loaded", entry("tokenizer_config.json", tokenizer_class=7)),
        ("the tokenizer of the model 'model' cannot be loaded", entry("tokenizer_config.json", chat_template=[5])),
        ("the tokenizer of the model 'model' cannot be loaded", entry("tokenizer_config.json", added_tokens_decoder=[1])),
        ("has no model.safetensors and no model.safetensors.index.json", gone("model.safetensors")),
        ("has no model.safetensors", in_place("model.safetensors", lambda path: path.symlink_to("/dev/zero"))),
        ("model.safetensors cannot be read as safetensors", cut("model.safetensors", 5000)),
        ("model.safetensors cannot be read as safetensors", text("model.safetensors", b"")),
        ("model.safetensors cannot be read as safetensors", text("model.safetensors", b"\xff" * 99)),
        ("lack 1 tensors, which would be random numbers: 'model.norm.weight'",
         tensors(lambda s: {k: v for k, v in s.items() if k != "model.norm.weight"})),
        ("'model.norm.weight' in model.safetensors holds whole numbers (I64)",
         tensors(lambda s: {k: v.long() if k == "model.norm.weight" else v for k, v in s.items()})),
        (" in model.safetensors holds whole numbers (I8)", tensors(lambda s: {k: v.char() for k, v in s.items()})),
        (" in model.safetensors holds whole numbers (U8)", tensors(lambda s: {k: v.byte() for k, v in s.items()})),
        ("norm.weight' in model.safetensors holds whole numbers (BOOL)",
         tensors(lambda s: {k.removeprefix("model."): v.bool() if "norm" in k else v for k, v in s.items()})),
        ("'model.embed_tokens.weight' is [19, 32] by the description and [608] in the file",
         tensors(lambda s: {k: v.flatten() for k, v in s.items()})),
        ("names '../model/a.safetensors', which is no", index({"a": "../model/a.safetensors"})),
        ("names '/etc/passwd', which is not a safetensors file of this folder", index({"a": "/etc/passwd"})),
        ("names 'b.safetensors', which is missing", index({"a": "b.safetensors"})),
        ("says that a.safetensors holds 'nope', which it does not", index({"nope": "a.safetensors"})),
        ("`weight_map` of model.safetensors.index.json must say", index({})),
        ("`weight_map` of model.safetensors.index.json must say", index(None)),
        ("`weight_map` of model.safetensors.index.json must say", index({"a": 5})),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(folder, said, edit):
    edit(folder)
    assert said in refused()


def test_sizes_are_compared_before_a_model_is_made(folder, monkeypatch):
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("made")
    )
    entry("config.json", num_hidden_layers=10**9)(folder)
    assert "too many for weights of 20 tensors" in refused()


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"]
)
def test_names_of_depth(name):
    import re

    assert re.fullmatch(LAYERS, name)
    assert not re.fullmatch(LAYERS, "max_window_layers")
