"""Compares entries of a checkpoint with the entries that this run would save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mpo.checks import is_count
from lightning_mpo.modules.trainer import callbacks_of

SAVED: dict[str, type] = {
    "_last_global_step_saved": int,
    "_last_checkpoint_saved": str,
    "_defer_save_until_validation": bool,
}
"""Types of the attributes about saves that `ModelCheckpoint` itself leaves out of checkpoints."""
LOOPS = {
    "fit": "fit_loop",
    "validate": "validate_loop",
    "test": "test_loop",
    "predict": "predict_loop",
}
"""The loop of each verb, by its name in a checkpoint."""


def check_loops(trainer: L.Trainer, content: Mapping[str, Any], stage: str) -> None:
    """Refuse counters of a loop that are missing or not whole numbers of at least 0.

    Args:
        trainer: the trainer of this run, whose loop has the expected counters.
        content: entries of the checkpoint.
        stage: the verb.

    Raises:
        TypeError: an entry is of another type; the message names it.
        ValueError: a counter is missing, negative or at odds with `global_step`.
    """
    name = LOOPS.get(stage)
    if name is None or "loops" not in content:
        return
    saved = content["loops"].get(name)
    _check_counts(getattr(trainer, name).state_dict(), saved, f"loops.{name}")
    if stage == "fit":
        automatic = saved["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        manual = saved["epoch_loop.manual_optimization.optim_step_progress"]
        steps = automatic["total"]["completed"] + manual["total"]["completed"]
        if steps != content["global_step"]:
            raise ValueError(
                f"`global_step` is {content['global_step']}, and its loops have counted {steps} "
                "updates"
            )


def check_metrics(name: str, metrics: Mapping[Any, Any]) -> None:
    """Refuse logged values that are not numbers.

    Args:
        name: name of the entry, for the message.
        metrics: values by metric.

    Raises:
        TypeError: a value is not a number; the message names its metric.
    """
    for metric, value in metrics.items():
        if not isinstance(metric, str) or not _is_score(value):
            raise TypeError(f"{metric!r} of `{name}` must be a number, got {shown_value(value)}")


def _check_counts(current: Any, saved: Any, place: str) -> None:
    """Refuse a saved tree whose keys or types are not those of the current tree."""
    if isinstance(current, Mapping):
        if not isinstance(saved, Mapping):
            raise TypeError(f"`{place}` must be a dict, got {shown_value(saved)}")
        for name, part in current.items():
            if name not in saved:
                raise ValueError(f"`{place}` has no {name!r}")
            _check_counts(part, saved[name], f"{place}.{name}")
    elif isinstance(current, bool):
        if not isinstance(saved, bool):
            raise TypeError(f"`{place}` must be true or false, got {shown_value(saved)}")
    elif isinstance(current, int) and not is_count(saved):
        raise ValueError(
            f"`{place}` must be a whole number of at least 0, got {shown_value(saved)}"
        )


def shown_value(value: Any) -> str:
    """Return the text of a plain value, or the class of any other, for messages."""
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__


# --- callbacks ------------------------------------------------------------------------------


def check_callbacks(trainer: L.Trainer, content: Mapping[str, Any]) -> None:
    """Refuse empty states of callbacks, and states of `ModelCheckpoint` with wrong types.

    Lightning never saves an empty state, and ignores one that it loads.

    Args:
        trainer: the trainer of this run, with its callbacks.
        content: entries of the checkpoint.

    Raises:
        TypeError: an entry of a state is of another type.
        ValueError: a state is empty or missing, or lacks an entry.
    """
    # states that are empty or have wrong types
    states = content["callbacks"]
    for callback in callbacks_of(trainer):
        if callback.state_key not in states:
            continue
        name, state = type(callback).__name__, states[callback.state_key]
        if not isinstance(state, dict) or not state:
            raise ValueError(
                f"the state of {name} must be a dict with entries, got {shown_value(state)}"
            )
        if isinstance(callback, ModelCheckpoint):
            _check_saves(name, state)
    # attributes about saves, and the states that were saved with them
    marks = (states.get("ExactResume") or {}).get("saved", {})
    for callback in trainer.checkpoint_callbacks:
        mark = marks.get(callback.state_key)
        if mark is None or not isinstance(callback, ModelCheckpoint):
            continue
        if callback.state_key not in states:
            raise ValueError(
                f"it has no state of {type(callback).__name__}, which was saved with it"
            )
        if (
            not isinstance(mark, dict)
            or {name: type(value) for name, value in mark.items()} != SAVED
        ):
            raise TypeError("`saved` of ExactResume is of another kind")


def _check_saves(callback: str, state: Mapping[str, Any]) -> None:
    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    for name in (*paths, "dirpath", "best_model_score", "kth_value", "best_k_models"):
        if name not in state:
            raise ValueError(f"the state of {callback} has no {name!r}")
        value = state[name]
        if name in paths:
            fits = isinstance(value, str)
        elif name == "dirpath":
            fits = value is None or isinstance(value, str)
        elif name == "best_k_models":
            fits = isinstance(value, dict) and all(
                isinstance(path, str) and _is_score(score) for path, score in value.items()
            )
        else:
            fits = value is None or _is_score(value)
        if not fits:
            raise TypeError(f"{name!r} of {callback} is of another kind: {shown_value(value)}")


def _is_score(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- weights --------------------------------------------------------------------------------


def check_weights(module: L.LightningModule, content: Mapping[str, Any], stage: str) -> None:
    """Refuse a checkpoint that lacks a trained weight, or holds integers for a float weight.

    Args:
        module: the module; its `policy` is built.
        content: entries of the checkpoint; its tensors may be outlines.
        stage: the verb. All weights of `mtp` or `critic` may be missing if they are frozen, or
            outside "fit" if the checkpoint has no `mtp` entry.

    Raises:
        TypeError: a weight of floats is saved as integers.
        ValueError: a weight is missing.
    """
    policy: Any = getattr(module, "policy", None)
    if not hasattr(policy, "trained_state"):
        return
    state = content["state_dict"]
    # a tied weight has several names, and any of them may be saved
    weights = dict(policy.named_parameters(remove_duplicate=False))
    tied_names: dict[int, list[str]] = {}
    for name, weight in weights.items():
        tied_names.setdefault(id(weight), []).append(name)
    saved_parts = {name.removeprefix("policy.").split(".", 1)[0] for name in state}
    for name, weight in policy.trained_state(weights).items():
        # missing
        saved_names = [alias for alias in tied_names[id(weight)] if f"policy.{alias}" in state]
        part = name.split(".", 1)[0]
        unused = not weight.requires_grad or (stage != "fit" and content.get("mtp") is None)
        optional = part in ("mtp", "critic") and part not in saved_parts and unused
        if not saved_names and not optional:
            raise ValueError(f"it has no weight {name!r}")
        # of another type
        for alias in saved_names:
            saved = state[f"policy.{alias}"]
            if weight.is_floating_point() and not saved.is_floating_point():
                raise TypeError(f"{alias!r} is of {saved.dtype}, the policy's of {weight.dtype}")
