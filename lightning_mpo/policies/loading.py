"""Loads configuration, tokenizer and weights of a model from checked files, without their code."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies.model_files import CONFIG, read_descriptions
from lightning_mpo.policies.model_kinds import CAUSAL, ModelKind
from lightning_mpo.policies.weight_files import (
    check_declared_sizes,
    check_dtypes,
    check_shapes,
    weight_shapes,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DROPOUTS = r"^(?!classifier|summary)(.*_)?(drop|dropout|pdrop|layerdrop|dropout_(prob|rate|p))$"
"""Names of dropout probabilities in configurations; those of classification heads are not used."""


@contextmanager
def one_line(subject: str) -> Iterator[None]:
    """Turn any exception within into one line that names the part of a model.

    Args:
        subject: the part and the model, for the message.

    Raises:
        UserError: instead of the exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if len(lines) > 1 and reason.endswith(":"):  # a heading
            reason += f" {lines[1]}"
        raise UserError(f"{subject} cannot be loaded: {reason[:300]}") from error


def load_config(location: str, kind: ModelKind = CAUSAL) -> PretrainedConfig:
    """Return the configuration of a model.

    Args:
        location: a folder or an id on the hub.
        kind: of the model.

    Raises:
        UserError: its files request code, cannot be read, or do not describe a language model of
            this kind that fits its weights.
    """
    from transformers import AutoConfig

    described = read_descriptions(location, kind)
    if "adapter_config.json" in described:  # transformers would load their base, wherever that is
        raise UserError(
            f"the model {location!r} holds adapters (adapter_config.json): name that folder as "
            "`policy.checkpoint` and their base as `policy.source`, with `policy.lora`"
        )
    folder = Path(location)
    shapes = weight_shapes(folder) if folder.is_dir() else None
    check_declared_sizes(described.get(CONFIG, {}), location, shapes)
    with one_line(f"{CONFIG} of the model {location!r}"):
        config = AutoConfig.from_pretrained(location, trust_remote_code=kind.remote_code)
        text = config.get_text_config()
        if not isinstance(text.vocab_size, int) or not isinstance(text.hidden_size, int):
            raise TypeError("`vocab_size` and `hidden_size` must be whole numbers")
    if shapes is not None and getattr(config, "quantization_config", None) is None:
        network = outline(config, torch.float32, location, kind)
        check_shapes(network, shapes, location)
        check_dtypes(network, folder)
    return config


def end_tokens(location: str, kind: ModelKind = CAUSAL) -> list[Any]:
    """Return the end tokens of a model's generation options, unchecked."""
    ends = read_descriptions(location, kind).get("generation_config.json", {}).get("eos_token_id")
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def drop_nothing(config: PretrainedConfig) -> list[str]:
    """Set the dropouts of a configuration to 0, so that sampler and trainer agree.

    Returns:
        the names of dropouts that were not 0.
    """
    names = []
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if re.search(DROPOUTS, name) and isinstance(value, float) and value > 0:
                setattr(part, name, 0.0)
                names.append(name)
    return sorted(names)


def positions_of(config: PretrainedConfig) -> int | None:
    """Return the most positions that a model can distinguish; None: no limit.

    `max_position_embeddings` may be the length before or after a scaling of rotary angles, so the
    longer one counts.
    """
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    if not isinstance(known, int):
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    longest = known
    for scaling in [
        rope,
        *(value for value in rope.values() if isinstance(value, dict)),
    ]:  # by kind of layer
        kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
        if kind not in (None, "default") and isinstance(factor, int | float):
            longest = max(
                longest, int(factor * (scaling.get("original_max_position_embeddings") or known))
            )
    return longest


def outline(
    config: PretrainedConfig, dtype: torch.dtype, location: str, kind: ModelKind = CAUSAL
) -> PreTrainedModel:
    """Return the model of a configuration without weights, on the meta device.

    Raises:
        UserError: no model can be built from it.
    """
    with one_line(f"the model that {CONFIG} of {location!r} describes"), torch.device("meta"):
        network: PreTrainedModel = kind.auto_class(config).from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=kind.remote_code
        )
    return network


def load_tokenizer(location: str, kind: ModelKind = CAUSAL) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Raises:
        UserError: its files request code, are missing, or cannot be read.
    """
    from transformers import AutoTokenizer

    read_descriptions(location, kind)
    with one_line(f"the tokenizer of the model {location!r}"):
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=kind.remote_code)
        if not len(tokenizer):
            raise ValueError("it knows no token")
    return tokenizer


def load_weights(
    location: str,
    config: PretrainedConfig | None,
    dtype: torch.dtype,
    kind: ModelKind = CAUSAL,
    **options: Any,
) -> PreTrainedModel:
    """Return a model with its weights, which are read as safetensors and never as pickles.

    Args:
        location: a folder or an id on the hub.
        config: from `load_config`; None: read again.
        dtype: of the weights.
        kind: of the model.
        options: more of `from_pretrained`, such as a quantisation.

    Raises:
        UserError: weights are missing, damaged or of other shapes.
    """
    if config is None:
        config = load_config(location, kind)
    # never pickles, and code of the folder only by choice
    subject = f"the weights of the model {location!r}"
    with one_line(subject):
        loaded: Any = kind.auto_class(config).from_pretrained(
            location,
            config=copy.deepcopy(config),
            dtype=dtype,
            trust_remote_code=kind.remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    network, report = loaded
    # a missing tensor would keep its random initialisation
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{subject} lack {len(missing)} tensors, which would be random numbers: "
            f"{missing[0]!r}, "
            "say"
        )
    return network
