"""Compares the results of two runs, bit for bit."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_mpo.recipes.tree import leaves
from lightning_mpo.storage import read_checkpoint

CLOCKS = ("throughput/", "time/", "memory/")
"""Prefixes of metrics that differ even between equal runs."""
PROMPTS = "prompts.jsonl"
"""Prompts of each rollout, as `PromptOrder` writes them."""


@dataclass(frozen=True)
class Comparison:
    """A part of two runs.

    Args:
        part: name of the part.
        count: number of values in the first run's part.
        difference: the first place where the runs differ, and both values; None: they are equal.
    """

    part: str
    count: int
    difference: str | None


def compare_runs(undisturbed: Path, resumed: Path) -> list[Comparison]:
    """Compare `checkpoints/last.ckpt`, `metrics.csv` and the prompts of two run folders.

    Args:
        undisturbed: folder of the run that was never killed.
        resumed: folder of the run that was killed and resumed.

    Raises:
        UserError: a checkpoint is missing or cannot be read.
    """
    first, second = (
        _parts(read_checkpoint(folder / "checkpoints" / "last.ckpt"))
        for folder in (undisturbed, resumed)
    )
    comparisons = [compare(part, first[part], second.get(part)) for part in first]
    comparisons.append(compare("prompt order", _prompts(undisturbed), _prompts(resumed)))
    comparisons.append(compare("metrics.csv", _rows(undisturbed), _rows(resumed)))
    return comparisons


def compare(part: str, first: Any, second: Any) -> Comparison:
    """Compare two trees of tensors and plain values."""
    first_values, second_values = _by_path(first), _by_path(second)
    new_paths = [path for path in second_values if path not in first_values]
    for path in [*first_values, *new_paths]:
        one, other = first_values.get(path, "nothing"), second_values.get(path, "nothing")
        if not _same(one, other):
            return Comparison(part, len(first_values), f"{part}{path}: {_show(one, other)}")
    return Comparison(part, len(first_values), None)


def _by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of nested dicts and lists by path, such as `[0][state]`."""
    return {"".join(f"[{key}]" for key in path): value for path, value in leaves(tree)}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(_bits(one), _bits(other))
        )
    return type(one) is type(other) and repr(one) == repr(other)  # as nan != nan


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _show(one: Any, other: Any) -> str:
    if (
        isinstance(one, torch.Tensor)
        and isinstance(other, torch.Tensor)
        and one.shape == other.shape
    ):
        differs = (one != other).reshape(-1)
        if differs.any():
            i = int(differs.nonzero()[0])
            first, second = one.reshape(-1)[i], other.reshape(-1)[i]
            counts = f"{int(differs.sum())} of {differs.numel()} values"
            return f"{counts}, the first {first} and {second}"
    return f"{str(one)[:80]} and {str(other)[:80]}"


def _parts(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a checkpoint that a resume must restore, by name."""
    # states of callbacks: `ExactResume`, `RolloutLoop`, and all others
    callbacks = dict(checkpoint["callbacks"])
    resume_state = callbacks.pop("ExactResume", {})
    rollout_state = callbacks.pop("RolloutLoop", {})
    others = {
        key: _ranking(state) if "Checkpoint" in key else _without_clocks(state)
        for key, state in callbacks.items()
        if isinstance(state, dict) and not key.startswith("Throughput") and ": datetime" not in key
    }
    parts = {
        "weights": checkpoint["state_dict"],
        "optimiser": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
        "update": [checkpoint["global_step"], checkpoint["epoch"]],
        "KL controller": checkpoint.get("kl_coefficient"),
        "random numbers": resume_state.get("ranks"),
        "rollout buffer": rollout_state.get("ranks"),
        "metrics so far": {
            name: value
            for name, value in resume_state.get("metrics", {}).items()
            if not name.startswith(CLOCKS)
        },
        "callbacks": others,
    }
    # averaged weights, if the run keeps them
    averages = {"weights of the moment": "current_model_state", "averages": "averaging_state"}
    return parts | {part: checkpoint[key] for part, key in averages.items() if key in checkpoint}


def _without_clocks(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in ("seconds", "clocks")}


def _ranking(state: dict[str, Any]) -> dict[str, Any]:
    """Return the scores by which a `ModelCheckpoint` ranks, without paths, which differ by run.

    Lightning does not load `current_score` back, and sets it before each use.
    """
    scores = {name: state.get(name) for name in ("best_model_score", "kth_value")}
    return scores | {
        "best_k_scores": sorted(float(score) for score in state.get("best_k_models", {}).values())
    }


def _prompts(folder: Path) -> dict[str, list[str]]:
    """Return prompts by rank and rollout; other prompts of a repeated rollout are kept as well."""
    prompts: dict[str, list[str]] = {}
    for path in sorted(folder.glob(f"*{PROMPTS}")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            key = f"rank {record['rank']}, rollout {record['rollout']}"
            if prompts.setdefault(key, record["prompts"]) != record["prompts"]:
                prompts[f"{key}, again"] = record["prompts"]
    return dict(sorted(prompts.items()))


def _rows(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
            for row in csv.DictReader(file)
        ]
