"""A rollout and its experience as the plain tensors and numbers of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from lightning_mpo.types import Experience, Rollout


def plain_state(batch: Experience | Rollout) -> dict[str, Any]:
    """Return the fields that plain loading can bring back: tensors and numbers, no texts."""
    state: dict[str, Any] = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Rollout):
            state[item.name] = plain_state(value)
        elif isinstance(value, torch.Tensor):
            state[item.name] = value.cpu()
        elif isinstance(value, int):
            state[item.name] = value
    return state


def check_state(kind: type[Experience] | type[Rollout], state: Mapping[str, Any]) -> None:
    """Refuse what `plain_state` does not return.

    Args:
        kind: of the batch.
        state: its fields, without a rollout within.

    Raises:
        TypeError: names a field that is of another kind, or whose rows are others than the first one's.
    """
    rows: int | None = None
    for item in fields(kind):
        if item.name not in state or item.name == "rollout":
            continue
        value, suffix = state[item.name], item.name.rsplit("_", 1)[-1]
        if not isinstance(value, torch.Tensor):
            if "Tensor" in str(item.type) or not isinstance(value, int):
                raise TypeError(f"`{item.name}` of the rollout is a {type(value).__name__}")
            continue
        if "Tensor" not in str(item.type) or value.ndim != len(suffix):
            raise TypeError(f"`{item.name}` of the rollout has {value.ndim} dimensions")
        rows = len(value) if rows is None else rows
        if len(value) != rows:
            raise TypeError(f"`{item.name}` of the rollout has {len(value)} rows, not {rows}")
        for part, dtype in (("mask", torch.bool), ("valid", torch.bool), ("outside", torch.bool)):
            if part in item.name and value.dtype != dtype:
                raise TypeError(f"`{item.name}` of the rollout is of {value.dtype}, not {dtype}")
