"""Conversion of a GGUF file, compared with an independent reading and with a manifest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies.gguf_files import convert
from lightning_mpo.policies.wheel_manifest import read_manifest
from tests.support.gguf_wheels import (
    TEMPLATE,
    TOKENS,
    write_manifest,
    write_pieces,
    write_tied_gguf,
)

NAMES = {
    **{"output": "model.embed_tokens", "output_norm": "model.norm"},
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"},
    **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The file of a tied model, and its manifest."""
    folder = tmp_path_factory.mktemp("gguf")
    write_tied_gguf(folder / "tied.gguf")
    return folder / "tied.gguf", write_pieces(folder, "tied", (folder / "tied.gguf").read_bytes())


def converted(tied: tuple[Path, dict[str, Any]], folder: Path) -> Path:
    file, manifest = tied
    source = write_manifest(folder / "tied.yaml", manifest)
    convert(file, folder / "model", read_manifest(source))
    return folder / "model"


def test_weights_are_those_of_an_independent_reading(tied, tmp_path: Path) -> None:
    import gguf
    from safetensors.torch import load_file

    weights = load_file(converted(tied, tmp_path) / "model.safetensors")
    read = {}
    for tensor in gguf.GGUFReader(tied[0]).tensors:
        *place, name, kind = tensor.name.split(".")
        if name != "token_embd":
            layer = f"model.layers.{place[1]}." if place else ""
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            read[f"{layer}{NAMES[name]}.{kind}"] = torch.from_numpy(values.copy())
    assert weights.keys() == read.keys()
    assert all(torch.equal(weights[name], read[name]) for name in read)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_the_finer_copy_of_a_tied_matrix_serves_both(tied, tmp_path: Path) -> None:
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted(tied, tmp_path))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tied[0]).tensors}
    fine, coarse = (
        torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        for name in ("output.weight", "token_embd.weight")
    )
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, fine)
    assert not torch.equal(fine, coarse)


def test_the_configuration_is_the_published_one(tied, tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    folder = converted(tied, tmp_path)
    config = AutoConfig.from_pretrained(folder)
    published = AutoConfig.for_model(**tied[1]["config"])
    published.dtype = torch.float32
    assert config.to_diff_dict() == published.to_diff_dict()
    assert config.rms_norm_eps == 1e-6, "the file holds it in single precision"
    assert config.tie_word_embeddings
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [6, 5]


def test_the_tokenizer_is_the_published_one(tied, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted(tied, tmp_path))
    assert tokenizer.get_vocab() == {text: id for id, text in enumerate(TOKENS)}
    assert tokenizer("ab b<turn><tool>")["input_ids"] == [3, 4, 6, 7]
    assert tokenizer.decode([3, 6, 7], skip_special_tokens=True) == "ab<tool>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        None,
        "<turn>",
        "<|endoftext|>",
    )
    assert tokenizer.model_max_length == 64
    assert tokenizer.get_chat_template() == TEMPLATE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 1e-5}, "the file says `rms_norm_eps` = 9.99999"),
        ({"end": 7}, "the file says `eos_token_id` = 7, and owner/tied has 6: it is another model"),
        ({"tokens": [*TOKENS[:6], "<other>", "<tool>"]}, "the `eos_token` of the tokenizer is '<o"),
        (
            {"tokens": [*TOKENS[:7], "<other>"]},
            "table of added tokens of the tokenizer is \"{5: '<",
        ),
    ],
)
def test_a_file_of_another_model_is_refused(
    tied, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_tied_gguf(tmp_path / "other.gguf", **changes)
    with pytest.raises(UserError) as refused:
        converted((tmp_path / "other.gguf", tied[1]), tmp_path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", 20, "number of tokens"),
        ("special_tokens", ["<|endoftext|>"], "table of added tokens"),
        ("pad_token", "<turn>", "`pad_token` of the tokenizer is '<|endoftext|>', and that of"),
        ("chat_template_sha256", "0" * 64, "SHA-256 of the chat template"),
    ],
)
def test_another_tokenizer_is_refused(
    tied, tmp_path: Path, key: str, value: object, message: str
) -> None:
    manifest = copy.deepcopy(tied[1])
    manifest["tokenizer"][key] = value
    with pytest.raises(UserError) as refused:
        converted((tied[0], manifest), tmp_path)
    assert message in str(refused.value)
    assert "it is another model" in str(refused.value)
