"""What a checkpoint must share with the run that goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import lightning as L

from lightning_mpo.errors import UserError
from lightning_mpo.objective import Objective
from lightning_mpo.policies.base import Policy
from lightning_mpo.policies.causal import CausalPolicy

VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "quantization_config")
"""Entries of a model's configuration that say nothing of its weights' shapes."""


BASE = ("policy.dtype", "policy.quantization", "policy.base")
"""What adapters were trained on: it is in no checkpoint and must be the same where training goes on."""


def identity(module: L.LightningModule) -> dict[str, Any]:
    """Return what a module's checkpoints can be recognised by; no weights are loaded for it."""
    found: dict[str, Any] = {"model": type(module).__name__}
    policy, objective = getattr(module, "policy", None), getattr(module, "objective", None)
    if isinstance(policy, Policy):
        found |= {
            "policy": type(policy).__name__,
            "architecture": _architecture(policy),
            "tokenizer": _tokenizer(policy),
        }
        lora = getattr(policy, "lora", None)
        found["policy.lora"] = asdict(lora) if is_dataclass(lora) and not isinstance(lora, type) else None
        found |= _base(policy)
        found["policy.critic"] = None if getattr(policy, "critic", None) is None else type(policy.critic).__name__
    if isinstance(objective, Objective):
        found["objective"] = objective.describe()
    return found


def check_identity(path: object, saved: Mapping[str, Any], own: Mapping[str, Any], *, algorithm: bool = True) -> None:
    """Refuse a checkpoint of another model, tokenizer, adapter or algorithm.

    Args:
        path: of the checkpoint, for the message.
        saved: the identity in it.
        own: that of the run.
        algorithm: whether the objective and the batch arithmetic count: they do where training goes on.

    Raises:
        UserError: the first thing that differs, and the way out.
    """
    for name in own:
        if (
            name not in saved
            or saved[name] == own[name]
            or (name == "policy.base" and None in (saved[name], own[name]))
        ):
            continue
        if name == "objective" or name.startswith(("rollout.", "trainer.", *BASE)):
            if algorithm:
                raise UserError(_other_algorithm(path, name, saved[name], own[name]))
            continue
        raise UserError(
            f"the checkpoint {path} has {_named(name)} {_first_apart(saved[name], own[name])}: give the options that it "
            "was trained with, or another checkpoint"
        )


def _other_algorithm(path: object, name: str, saved: Any, own: Any) -> str:
    if name == "objective":
        axes = zip(saved.split(" | "), own.split(" | "), strict=False)
        saved, own = next(((one, other) for one, other in axes if one != other), (saved, own))
    what = "objective" if name == "objective" else f"`{name}`"
    return (
        f"the checkpoint {path} was saved with the {what} {saved}, and the configuration has {own}: a run goes on as it "
        "began; for a new one from these weights give `policy.checkpoint` instead of `--ckpt_path`"
    )


def _named(name: str) -> str:
    return {
        "model": "the model",
        "policy": "the policy",
        "architecture": "the architecture",
        "tokenizer": "the tokenizer",
    }.get(name, f"`{name}`")


def _first_apart(saved: Any, own: Any) -> str:
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        key = next(key for key in {**own, **saved} if saved.get(key) != own.get(key))
        return f"{key} {saved.get(key)!r}, the configuration {own.get(key)!r}"
    return f"{_short(saved)}, the configuration {_short(own)}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    return f"of rank {value['rank']}" if isinstance(value, Mapping) and "rank" in value else str(value)


def _base(policy: Policy) -> dict[str, Any]:
    """Describe the weights that a LoRA run's checkpoints leave out."""
    if getattr(policy, "lora", None) is None or not isinstance(policy, CausalPolicy):
        return {}
    quantised = None if policy.quantization is None else asdict(policy.quantization)
    return dict(zip(BASE, (str(policy.dtype), quantised, policy.base_fingerprint), strict=True))


def _architecture(policy: Policy) -> dict[str, Any] | None:
    config = getattr(policy, "config", None)
    if config is None:
        return None
    content = {key: value for key, value in config.to_dict().items() if key not in VOLATILE}
    text = config.get_text_config()
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {size: getattr(text, size, None) for size in sizes} | {"digest": _digest(content)}


def _tokenizer(policy: Policy) -> str:
    tokenizer = policy.tokenizer
    return _digest([sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
