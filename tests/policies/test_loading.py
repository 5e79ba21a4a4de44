"""Model folders from anybody: no code of theirs runs, and other layouts load."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy
from tests.support.model_folders import entry, in_place, index, load, refused, tensors

CODE = "from pathlib import Path\nPath('EXECUTED').write_text('x')\n"
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
