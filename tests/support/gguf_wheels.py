"""Wheels with GGUF files, which pip takes from a local folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import yaml

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}</s>{% endif %}"
TOKENS = ["a", "b", "Ġ", "ab", "Ġb", "<|endoftext|>", "<turn>", "<tool>"]
"""Tokens of the tied model; the last three are added ones. Its embedding has 16 rows."""


def write_gguf(file: Path) -> None:
    """Write a Llama of one layer with a byte-pair tokenizer of eight tokens."""
    import gguf
    import numpy as np

    tokens = ["<pad>", "<s>", "</s>", "a", "b", "Ġ", "ab", "Ġb"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "Ġ b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (8, 8), "output_norm": (8,)}
    shapes |= {
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
    }
    shapes |= {"blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16)}
    shapes |= {"blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tied_gguf(file: Path, **changes: Any) -> None:
    """Write a Qwen2 of one layer whose tied matrix is in the file twice, in 5 and in 8 bits.

    Args:
        file: to be written.
        changes: `eps`, `tokens` or `end` other than those of `manifest`.
    """
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Kind

    tokens = changes.get("tokens", TOKENS)
    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_name("tied")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(changes.get("eps", 1e-6))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    rows = [*tokens, *(f"[PAD{i}]" for i in range(len(tokens), 16))]
    writer.add_token_list(rows)
    # 1 text, 3 control, 5 no token; the file takes `<tool>` for a control token as well
    writer.add_token_types([1] * 5 + [3] * (len(tokens) - 5) + [5] * (16 - len(tokens)))
    writer.add_token_merges(["a b", "Ġ b"])
    writer.add_bos_token_id(5)
    writer.add_eos_token_id(changes.get("end", 6))
    writer.add_pad_token_id(5)
    writer.add_chat_template(TEMPLATE)
    # two copies of the tied matrix, then the others
    random = np.random.default_rng(0)
    matrix = random.standard_normal((16, 32), dtype=np.float32)
    for name, kind in (("output", Kind.Q8_0), ("token_embd", Kind.Q5_0)):
        writer.add_tensor(f"{name}.weight", gguf.quantize(matrix, kind), raw_dtype=kind)
    shapes = {"output_norm.weight": (32,), "attn_q.weight": (32, 32), "attn_q.bias": (32,)}
    shapes |= {"attn_k.weight": (16, 32), "attn_k.bias": (16,), "attn_v.weight": (16, 32)}
    shapes |= {"attn_v.bias": (16,), "attn_output.weight": (32, 32), "attn_norm.weight": (32,)}
    shapes |= {"ffn_gate.weight": (64, 32), "ffn_up.weight": (64, 32), "ffn_down.weight": (32, 64)}
    shapes |= {"ffn_norm.weight": (32,)}
    for name, shape in shapes.items():
        place = name if name.startswith("output") else f"blk.0.{name}"
        writer.add_tensor(place, random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(
    folder: Path, name: str, version: str, files: dict[str, bytes], more: str = ""
) -> None:
    """Write a wheel; `more` is added to its metadata."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}"
    files = files | {
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def write_pieces(folder: Path, name: str, content: bytes, count: int = 3) -> dict[str, Any]:
    """Write wheels with pieces of a file; return the manifest of the tied model."""
    size = -(-len(content) // count)
    pieces = []
    for i in range(count):
        piece, file = content[i * size : (i + 1) * size], f"{name}{i}/data/part.bin"
        more = "Author-email: Somebody <somebody@example.com>\nLicense-Expression: MIT\n"
        write_wheel(folder, f"{name}{i}", "1.0", {file: piece}, more)
        digest = hashlib.sha256(piece).hexdigest()
        pieces.append({"wheel": f"{name}{i}==1.0", "file": file, "sha256": digest})
    return {
        "model": "owner/tied",
        "sha256": hashlib.sha256(content).hexdigest(),
        "pieces": pieces,
        "config": {
            **{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 16},
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6},
            **{"rope_theta": 10000.0, "max_position_embeddings": 64, "max_window_layers": 1},
            **{"tie_word_embeddings": True, "bos_token_id": 5, "eos_token_id": 6},
        },
        "generation": {"eos_token_id": [6, 5], "pad_token_id": 5},
        "tokenizer": {
            **{"size": 8, "special_tokens": TOKENS[5:7], "other_added_tokens": TOKENS[7:]},
            **{"eos_token": "<turn>", "pad_token": "<|endoftext|>", "bos_token": None},
            "model_max_length": 64,
            "chat_template_sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest(),
        },
    }


def write_manifest(file: Path, content: dict[str, Any]) -> str:
    """Write a manifest; return the model source that names it."""
    file.write_text(yaml.safe_dump(content))
    return f"wheels:{file}"
