"""Model folders from anybody: no code of theirs runs, and each that cannot be loaded is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.policies.model_files import LAYERS

CODE = "from pathlib import Path\nPath('EXECUTED').write_text('x')\n"
Edit = Callable[[Path], object]


@pytest.fixture
def folder(tiny_folder, tmp_path, monkeypatch) -> Path:
    """A copy of a tiny model in the working directory; nobody answers questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def load(source: str = "model", **options) -> CausalPolicy:
    policy = CausalPolicy(source, **options)
    policy.check()
    _ = policy.tokenizer, policy.end_tokens
    policy.build(device=torch.device("cpu"), reference=False)
    return policy


def refused(**options) -> str:
    with pytest.raises(UserError) as error:
        load(**options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


def entry(file: str, **entries: object) -> Edit:
    """Set entries of a JSON file; `...` takes one out."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        content = {key: value for key, value in (content | entries).items() if value is not ...}
        (folder / file).write_text(json.dumps(content))

    return edit


def text(file: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / file).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def gone(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def cut(file: str, size: int) -> Edit:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def in_place(file: str, make: Callable[[Path], object]) -> Edit:
    """Put something else than a file in a file's place."""

    def edit(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Edit:
    from safetensors.torch import load_file, save_file

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return edit


def index(table: object, file: str = "a.safetensors") -> Edit:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))

    return edit


# --- code ---------------------------------------------------------------------------------------------------------------

CLASSES = {
    "AutoConfig": "evil.C",
    "AutoModelForCausalLM": "evil.M",
    "AutoTokenizer": ["evil.T", None],
}


@pytest.mark.parametrize(
    "edit",
    [
        entry("config.json", auto_map=CLASSES),
        entry("config.json", auto_map=CLASSES, model_type="evil"),
        entry("config.json", text_config={"auto_map": CLASSES}),
        entry("tokenizer_config.json", auto_map=CLASSES, tokenizer_class="Evil"),
        entry("tokenizer_config.json", auto_map=["evil.T", None], tokenizer_class="Evil"),
        entry(
            "tokenizer_config.json", auto_map={"AutoTokenizer": ["somebody/model--evil.T", None]}
        ),
        entry("generation_config.json", auto_map=CLASSES),
        entry("processor_config.json", auto_map={"AutoProcessor": "evil.P"}),
        entry("special_tokens_map.json", auto_map=CLASSES),
    ],
)
def test_code_in_a_folder_is_refused_and_never_run(folder, edit):
    (folder / "evil.py").write_text(CODE)
    edit(folder)
    assert "names code of its own (`auto_map`), and code in model folders is never run" in refused()
    assert not Path("EXECUTED").exists()
    assert "evil" not in sys.modules


def test_transformers_is_told_as_well_not_to_run_code(folder, monkeypatch):
    (folder / "evil.py").write_text(CODE)
    for file in ("config.json", "tokenizer_config.json"):
        entry(file, auto_map=CLASSES, model_type="evil", tokenizer_class="Evil")(folder)
    monkeypatch.setattr("lightning_mpo.policies.model_files._refuse_code", lambda *_: None)
    for part in ("config", "tokenizer"):
        with pytest.raises(UserError, match="cannot be loaded"):
            getattr(CausalPolicy("model"), part)
    assert not Path("EXECUTED").exists()


def test_the_hub_is_asked_for_descriptions_first(folder, monkeypatch):
    (folder / "evil.py").write_text(CODE)
    entry("tokenizer_config.json", auto_map=CLASSES)(folder)

    def fetch(source: str, name: str, **_: object) -> str | None:
        path = folder / name
        return str(path) if path.exists() else None

    monkeypatch.setattr("transformers.utils.cached_file", fetch)
    assert "the model 'somebody/model': tokenizer_config.json names code of its own" in refused(
        source="somebody/model"
    )


@pytest.mark.parametrize(
    ("said", "edit"),
    [
        (
            "requests the kernel 'evil/kernel'",
            entry("config.json", attn_implementation="evil/kernel"),
        ),
        ("requests the kernel", entry("config.json", _attn_implementation={"": "evil/kernel:f"})),
        ("requests the kernel", entry("config.json", experts_implementation="evil/kernel")),
        (
            "names another file of weights",
            entry("config.json", transformers_weights="../x.safetensors"),
        ),
        (
            "holds adapters (adapter_config.json)",
            entry("adapter_config.json", base_model_name_or_path="/else"),
        ),
        ("pytorch_model.bin is a pickle, which is code, and is never read", lambda f: pickled(f)),
        (
            "names 'pytorch_model.bin', which is not a safetensors file",
            index({"a": "pytorch_model.bin"}),
        ),
    ],
)
def test_what_leads_to_code_or_elsewhere(folder, said, edit):
    edit(folder)
    assert said in refused()
    assert not Path("EXECUTED").exists()


def pickled(folder: Path) -> None:
    from tests.support.malicious import write_malicious

    (folder / "model.safetensors").unlink()
    write_malicious(folder / "pytorch_model.bin")


# --- damage -------------------------------------------------------------------------------------------------------------

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


# --- what works ---------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(
    "edit",
    [
        shards,
        tensors(lambda state: {key: value.bfloat16() for key, value in state.items()}),
        tensors(lambda state: {key: value.double() for key, value in state.items()}),
        entry("config.json", torch_dtype="bfloat16", dtype=...),
        entry("config.json", torch_dtype="float16"),
        entry("config.json", max_window_layers=28, max_position_embeddings=131072),
        entry("config.json", attn_implementation="sdpa"),
        entry("config.json", auto_map={}),
        in_place("model.safetensors", lambda path: path.symlink_to("../blob")),
    ],
)
def test_other_layouts_load(folder, edit):
    shutil.copy(folder / "model.safetensors", "blob")  # as the hub's cache keeps files
    before = load().network.get_input_embeddings().weight.clone()
    edit(folder)
    after = load().network.get_input_embeddings().weight
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)
