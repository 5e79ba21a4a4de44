"""Conversion of GGUF files to folders that transformers loads: float32 weights, and a tokenizer.

A manifest adds the values that the authors of a model published. The file is compared with them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mpo.errors import UserError
from lightning_mpo.policies.wheel_manifest import Manifest, PublishedTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def convert(file: Path, folder: Path, manifest: Manifest | None = None) -> None:
    """Save a GGUF file as a plain folder: tokenizer with its chat template, float32 safetensors.

    Args:
        file: the GGUF file.
        folder: to be made.
        manifest: published values, with which the file is compared and which the folder then holds;
            None: the folder holds the values of the file.

    Raises:
        UserError: a value of the file is not the published one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _memoised_gguf():
        # first the small parts
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        tokenizer.save_pretrained(folder)
        if manifest is not None:
            _check_config(file, manifest)
            _publish_tokenizer(tokenizer, folder, manifest)
        del tokenizer
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
        if manifest is not None:
            _publish_config(model, file, manifest)
    # The weights are dense, yet transformers marks the model as quantised and refuses to save it.
    vars(model).update(hf_quantizer=None, is_quantized=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


@contextlib.contextmanager
def _memoised_gguf() -> Iterator[None]:
    """Keep transformers from reading the file thrice (20 s become 8)."""
    import gguf

    originals = {name: getattr(gguf, name) for name in ("get_tensor_name_map", "GGUFReader")}
    vars(gguf).update({name: functools.lru_cache(entry) for name, entry in originals.items()})
    try:
        yield
    finally:
        vars(gguf).update(originals)


def _check_config(file: Path, manifest: Manifest) -> None:
    """Compare each value of the configuration that the file states with the published one."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    stated = load_gguf_checkpoint(file)["config"]
    for key, value in manifest.config.items():
        may_differ = key == "tie_word_embeddings" and value  # a file may hold a tied matrix twice
        if key in stated and not may_differ and not _same(stated[key], value):
            raise UserError(
                f"{manifest.path}: the file says `{key}` = {stated[key]!r}, and "
                f"{manifest.model} has {value!r}: it is another model"
            )


def _same(stated: Any, published: Any) -> bool:
    """Compare two values; a GGUF file holds fractions in single precision."""
    if isinstance(stated, float) and isinstance(published, int | float):
        return math.isclose(stated, published, rel_tol=2**-23)
    return bool(stated == published)


def _publish_config(model: PreTrainedModel, file: Path, manifest: Manifest) -> None:
    """Give a model the published configuration, and one matrix where that ties two."""
    import gguf
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.for_model(**manifest.config)
    config.dtype = model.dtype
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if config.tie_word_embeddings and embedding.weight is not head.weight:
        # the file holds two quantised copies: the larger one is the finer
        sizes = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors}
        head_is_finer = sizes["output.weight"] > sizes["token_embd.weight"]
        embedding.weight = head.weight = (head if head_is_finer else embedding).weight
    model.config = config
    model.generation_config = GenerationConfig(**manifest.generation)


def _publish_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, manifest: Manifest
) -> None:
    """Save a tokenizer as it was published, and compare the result.

    A GGUF file names a text for each row of the embedding, also for rows without a token, and has
    other marks for special tokens.
    """
    from transformers import AutoTokenizer

    published = manifest.tokenizer
    # the names that a role has, before they are set
    for role in ("eos_token", "pad_token"):
        _compare(manifest, f"`{role}`", getattr(tokenizer, role), getattr(published, role))
    tokenizer.bos_token = published.bos_token
    tokenizer.model_max_length = published.model_max_length
    tokenizer.save_pretrained(folder)
    # the table
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {text: id for text, id in vocabulary.items() if id < published.size}
    for token in content["added_tokens"]:
        token["special"] = token["content"] in published.special_tokens
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    # the result, as it will be loaded
    _compare_tokenizer(AutoTokenizer.from_pretrained(folder), manifest, published)


def _compare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, manifest: Manifest, published: PublishedTokenizer
) -> None:
    added = tokenizer.added_tokens_decoder
    special = [token.content for _, token in sorted(added.items()) if token.special]
    template = hashlib.sha256((tokenizer.get_chat_template() or "").encode()).hexdigest()
    for name, actual, expected in (
        ("number of tokens", len(tokenizer), published.size),
        (
            "table of added tokens",
            {id: t.content for id, t in added.items()},
            published.added_tokens,
        ),
        ("list of special tokens", special, published.special_tokens),
        ("`bos_token`", tokenizer.bos_token, published.bos_token),
        ("SHA-256 of the chat template", template, published.chat_template_sha256),
    ):
        _compare(manifest, name, actual, expected)


def _compare(manifest: Manifest, name: str, actual: Any, expected: Any) -> None:
    if actual != expected:
        raise UserError(
            f"{manifest.path}: the {name} of the tokenizer is {str(actual)[:100]!r}, and that of "
            f"{manifest.model} is {str(expected)[:100]!r}: it is another model"
        )
