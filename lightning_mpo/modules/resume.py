"""What exact resume needs beyond Lightning: mended loop progress, and the state of every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist

from lightning_mpo.policies.base import Policy
from lightning_mpo.types import Experience, Rollout


def mend_epoch_end(checkpoint: dict[str, Any]) -> None:
    """Rewrite the progress of a checkpoint of `on_train_epoch_end` as if it had been saved with the last batch before.

    Without `max_epochs`, Lightning 2.6.6 resumes it with one batch more than the epoch has: an update on a single
    micro-batch, and a rollout that is thrown away. An epoch that `max_steps` cut short it counts twice. Checkpoints of
    `on_train_batch_end` it resumes rightly. The dict is changed in place, before Lightning reads it.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return
    batch, epoch = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    if not batch["current"]["completed"] or epoch["current"]["processed"] != epoch["current"]["started"]:
        return  # saved within an epoch
    for counts in (epoch["total"], epoch["current"]):
        counts["processed"] -= 1
        counts["completed"] = min(counts["completed"], counts["processed"])
    if batch["is_last_batch"] and batch["current"]["completed"] == batch["current"]["processed"]:
        for counts in (batch["total"], batch["current"]):
            counts["completed"] -= 1
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # the loop adds it again


def keep_trained(checkpoint: dict[str, Any], policy: Policy) -> None:
    """Leave in a checkpoint of a module with a `policy` what is trained, not what is reloaded, in place."""
    state = {key.removeprefix("policy."): value for key, value in checkpoint["state_dict"].items()}
    checkpoint["state_dict"] = {f"policy.{key}": value for key, value in policy.trained_state(state).items()}


def place() -> tuple[int, int]:
    """Return (rank, processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the states of all ranks: Lightning writes rank 0's alone."""
    states: list[Any] = [state] * place()[1]
    if len(states) > 1:
        dist.all_gather_object(states, state)
    return states


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
