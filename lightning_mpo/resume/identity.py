"""The identity of a run, which a checkpoint to resume from must share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import lightning as L

from lightning_mpo.errors import UserError
from lightning_mpo.objective.objective import Objective
from lightning_mpo.policies.base import Policy
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.masked import MaskedPolicy

VOLATILE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "quantization_config",
)
"""Entries of a model's configuration on which the shapes of its weights do not depend."""


BASE = ("policy.dtype", "policy.quantization", "policy.base")
"""Entries on the base model of adapters: no checkpoint holds it, and it must not change."""


def identity(module: L.LightningModule) -> dict[str, Any]:
    """Return the identity of a module's checkpoints; no weights are loaded."""
    identity_entries: dict[str, Any] = {"model": type(module).__name__}
    policy, objective = getattr(module, "policy", None), getattr(module, "objective", None)
    if isinstance(policy, Policy):
        identity_entries |= {
            "policy": type(policy).__name__,
            "architecture": _architecture(policy),
            "tokenizer": _tokenizer_digest(policy),
        }
        lora = getattr(policy, "lora", None)
        identity_entries["policy.lora"] = (
            asdict(lora) if is_dataclass(lora) and not isinstance(lora, type) else None
        )
        identity_entries |= _base(policy) | _masking(policy)
        identity_entries["policy.critic"] = (
            None if getattr(policy, "critic", None) is None else type(policy.critic).__name__
        )
    if isinstance(objective, Objective):
        identity_entries["objective"] = objective.describe()
    return identity_entries


def check_identity(
    path: object,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    algorithm: bool = True,
    options: Sequence[tuple[str, Any, Any]] = (),
) -> None:
    """Refuse a checkpoint of another model, tokenizer, adapter or algorithm.

    Args:
        path: path of the checkpoint, for the message.
        saved: the identity in the checkpoint.
        current: the identity of this run.
        algorithm: also compare the objective, the batch sizes, the base model and `options`, as
            training needs.
        options: differences of options: (name, saved value, present value).

    Raises:
        UserError: the identities differ. The message gives the way out, and the first difference
            of the model or all differences of the algorithm.
    """
    # differences: those of the model are refused at once
    changes: list[tuple[str, Any, Any]] = []
    for name in current:
        if (
            name not in saved
            or saved[name] == current[name]
            or (name == "policy.base" and None in (saved[name], current[name]))
        ):
            continue
        if name == "objective":
            axes = _changed_axes(saved[name], current[name])
            changes += [("objective", *axis) for axis in axes]
        elif name.startswith(("rollout.", "trainer.", *BASE)):
            changes.append((f"`{name}`", saved[name], current[name]))
        else:
            raise UserError(
                f"the checkpoint {path} has {_described(name)} "
                f"{_first_difference(saved[name], current[name])}: give the options that it was "
                "trained with, or another checkpoint"
            )
    # all differences of the algorithm in one message
    changes += [(f"`{name}`", before, now) for name, before, now in options]
    if changes and algorithm:
        raise UserError(
            f"the checkpoint {path} was saved with the "
            + " and the ".join(f"{name} {_cut(before)}" for name, before, _ in changes)
            + f", and the configuration has {' and '.join(_cut(now) for *_, now in changes)}: "
            "a run goes on as it began; for a new one from these weights give "
            "`policy.checkpoint` instead of `--ckpt_path`"
        )


def _changed_axes(saved: str, current: str) -> list[tuple[str, str]]:
    """Return the axes of an objective that differ: saved and present description."""
    axes = zip(saved.split(" | "), current.split(" | "), strict=False)
    return [(before, now) for before, now in axes if before != now] or [(saved, current)]


def _cut(value: Any, length: int = 160) -> str:
    text = repr(value) if isinstance(value, str) and (not value or "\n" in value) else str(value)
    return text if len(text) <= length else f"{text[: length - 2]} …"


def _described(name: str) -> str:
    return {
        "model": "the model",
        "policy": "the policy",
        "architecture": "the architecture",
        "tokenizer": "the tokenizer",
    }.get(name, f"`{name}`")


def _first_difference(saved: Any, current: Any) -> str:
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        key = next(key for key in {**current, **saved} if saved.get(key) != current.get(key))
        return f"{key} {saved.get(key)!r}, the configuration {current.get(key)!r}"
    return f"{_short(saved)}, the configuration {_short(current)}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    return (
        f"of rank {value['rank']}" if isinstance(value, Mapping) and "rank" in value else str(value)
    )


def _base(policy: Policy) -> dict[str, Any]:
    """Describe the base model, which the checkpoints of a LoRA run leave out."""
    if getattr(policy, "lora", None) is None or not isinstance(policy, LoadedPolicy):
        return {}
    quantised = None if policy.quantization is None else asdict(policy.quantization)
    return dict(zip(BASE, (str(policy.dtype), quantised, policy.base_digest), strict=True))


def _masking(policy: Policy) -> dict[str, Any]:
    """Describe how a masked policy hides and predicts tokens; empty for a causal one."""
    if not isinstance(policy, MaskedPolicy):
        return {}
    mask = policy.tokenizer.convert_ids_to_tokens(policy.mask_id)
    return {"policy.mask_token": mask, "policy.shift": policy.shift}


def _architecture(policy: Policy) -> dict[str, Any] | None:
    config = getattr(policy, "config", None)
    if config is None:
        return None
    content = {key: value for key, value in config.to_dict().items() if key not in VOLATILE}
    text = config.get_text_config()
    sizes = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    return {size: getattr(text, size, None) for size in sizes} | {"digest": _digest(content)}


def _tokenizer_digest(policy: Policy) -> str:
    tokenizer = policy.tokenizer
    return _digest([sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[
        :12
    ]
