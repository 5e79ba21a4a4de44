"""Compares the inner entries of a checkpoint with those that the run itself would save."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mpo.modules.trainer import callbacks_of

SAVED: dict[str, type] = {
    "_last_global_step_saved": int,
    "_last_checkpoint_saved": str,
    "_defer_save_until_validation": bool,
}
"""What `ModelCheckpoint` knows of its saves and leaves out of checkpoints."""
LOOPS = {
    "fit": "fit_loop",
    "validate": "validate_loop",
    "test": "test_loop",
    "predict": "predict_loop",
}
"""The loop of each verb, by its name in a checkpoint."""
SWITCHES = ("foreach", "fused")
"""Options of optimisers that are true, false or None."""


def check_loops(trainer: L.Trainer, content: Mapping[str, Any], stage: str) -> None:
    """Refuse counters of a loop that are missing or no counts.

    Args:
        trainer: whose own loop has the same parts.
        content: of the checkpoint.
        stage: the verb.

    Raises:
        ValueError: names the counter.
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
                f"`global_step` is {content['global_step']}, and its loops have counted {steps} updates"
            )


def check_metrics(name: str, metrics: Mapping[Any, Any]) -> None:
    """Refuse logged values that are no numbers.

    Args:
        name: of the entry.
        metrics: values by name.

    Raises:
        TypeError: names the value.
    """
    for metric, value in metrics.items():
        if not isinstance(metric, str) or not _is_score(value):
            raise TypeError(f"{metric!r} of `{name}` must be a number, got {_got(value)}")


def _check_counts(own: Any, saved: Any, place: str) -> None:
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            raise TypeError(f"`{place}` must be a dict, got {_got(saved)}")
        for name, part in own.items():
            if name not in saved:
                raise ValueError(f"`{place}` has no {name!r}")
            _check_counts(part, saved[name], f"{place}.{name}")
    elif isinstance(own, bool):
        if not isinstance(saved, bool):
            raise TypeError(f"`{place}` must be true or false, got {_got(saved)}")
    elif isinstance(own, int) and not is_count(saved):
        raise ValueError(f"`{place}` must be a whole number of at least 0, got {_got(saved)}")


def is_count(value: Any) -> bool:
    """Say whether a value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _got(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__


# --- callbacks ----------------------------------------------------------------------------------


def check_callbacks(trainer: L.Trainer, content: Mapping[str, Any]) -> None:
    """Refuse empty states of the run's callbacks, and states of `ModelCheckpoint` of another kind.

    Lightning saves no empty state, and passes over one that it reads.

    Args:
        trainer: with its callbacks.
        content: of the checkpoint.

    Raises:
        ValueError: names the callback.
    """
    states = content["callbacks"]
    for callback in callbacks_of(trainer):
        if callback.state_key not in states:
            continue
        name, state = type(callback).__name__, states[callback.state_key]
        if not isinstance(state, dict) or not state:
            raise ValueError(f"the state of {name} must be a dict with entries, got {_got(state)}")
        if isinstance(callback, ModelCheckpoint):
            _check_saves(name, state)
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
            raise TypeError(f"{name!r} of {callback} is of another kind: {_got(value)}")


def _is_score(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- weights ------------------------------------------------------------------------------------


def check_weights(module: L.LightningModule, content: Mapping[str, Any], stage: str) -> None:
    """Refuse a checkpoint that lacks a weight which such a run saves, or holds whole numbers for it.

    Args:
        module: with a `policy` that is built.
        content: of the checkpoint; its tensors may be outlines.
        stage: the verb. Heads that no training has made may be missing where nothing is trained.

    Raises:
        ValueError: names the weight.
    """
    policy: Any = getattr(module, "policy", None)
    if not hasattr(policy, "trained_state"):
        return
    state = content["state_dict"]
    every = dict(policy.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}  # a tied weight has several
    for name, weight in every.items():
        names.setdefault(id(weight), []).append(name)
    held_parts = {name.removeprefix("policy.").split(".", 1)[0] for name in state}
    for name, weight in policy.trained_state(every).items():
        held = [other for other in names[id(weight)] if f"policy.{other}" in state]
        part = name.split(".", 1)[0]
        unused = not weight.requires_grad or (stage != "fit" and content.get("mtp") is None)
        if not held and not (part in ("mtp", "critic") and part not in held_parts and unused):
            raise ValueError(f"it has no weight {name!r}")
        for other in held:
            saved = state[f"policy.{other}"]
            if weight.is_floating_point() and not saved.is_floating_point():
                raise TypeError(f"{other!r} is of {saved.dtype}, the policy's of {weight.dtype}")


# --- optimisers ---------------------------------------------------------------------------------


def describe_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, str]]:
    """Return what an optimiser keeps of each parameter: kinds by name, by the parameter's place."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {
        i: {str(name): _kind(value) for name, value in optimizer.state[weight].items()}
        for i, weight in enumerate(weights)
        if optimizer.state.get(weight)
    }


def check_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    described: Mapping[int, Mapping[str, str]] | None,
    names: Mapping[int, str],
) -> None:
    """Refuse a state that the optimiser would take and stumble over, or go on without.

    Args:
        optimizer: of the run.
        saved: its state in the checkpoint.
        described: `describe_state` at the time of the save; None: not known.
        names: of the weights, by `id`.

    Raises:
        ValueError: names the weight or the option.
    """
    states, groups = saved.get("state"), saved.get("param_groups")
    if not isinstance(states, dict) or not isinstance(groups, list):
        raise TypeError("the state of the optimiser must have `state` and `param_groups`")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"its optimiser has {len(groups)} groups of weights, the run's {len(optimizer.param_groups)}"
        )
    places: dict[Any, Tensor] = {}
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        _check_options(group, own)
        if len(group["params"]) != len(own["params"]):
            raise ValueError(
                f"a group of its optimiser has {len(group['params'])} weights, the run's {len(own['params'])}"
            )
        places |= dict(zip(group["params"], own["params"], strict=True))
    shown = {place: names.get(id(weight), str(place)) for place, weight in places.items()}
    for place, state in states.items():
        if place not in places or not isinstance(state, dict):
            raise ValueError(f"the optimiser's state of weight {shown.get(place, place)!r} is none")
    if described is not None:
        _check_kept(states, described, shown)


def _check_kept(
    states: Mapping[Any, Mapping[str, Any]],
    described: Mapping[int, Mapping[str, str]],
    shown: Mapping[Any, str],
) -> None:
    """Compare states with the kinds that were noted when they were saved; some weights have none."""
    for place in [
        *described,
        *(place for place in states if place not in described and states[place]),
    ]:
        kinds = {str(name): _kind(value) for name, value in states.get(place, {}).items()}
        wanted = described.get(place, {})
        for name in [*wanted, *(name for name in kinds if name not in wanted)]:
            if kinds.get(name) != wanted.get(name):
                raise ValueError(
                    f"the optimiser's {name!r} of {shown.get(place, place)!r} was {wanted.get(name, 'not there')} "
                    f"and is {kinds.get(name, 'not there')}"
                )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return type(value).__name__


def _check_options(saved: Any, own: Mapping[str, Any]) -> None:
    """Refuse options of a group that are of another kind than the run's."""
    if not isinstance(saved, dict) or not isinstance(saved.get("params"), list):
        raise TypeError("a group of its optimiser has no list of `params`")
    for name, value in own.items():
        if name != "params" and name in saved and not _is_option(name, saved[name], value):
            raise ValueError(
                f"the optimiser's option {name!r} must be such as {_show(value)}, got {_show(saved[name])}"
            )


def _is_option(name: str, saved: Any, own: Any) -> bool:
    if name in SWITCHES:
        return saved is None or isinstance(saved, bool)
    if isinstance(own, bool):
        return isinstance(saved, bool)
    if isinstance(own, Sequence) and not isinstance(own, str):
        return (
            isinstance(saved, list | tuple)
            and len(saved) == len(own)
            and all(_is_option("", one, other) for one, other in zip(saved, own, strict=True))
        )
    number, usual = _number(saved), _number(own)
    if usual is not None:
        return number is not None and math.isfinite(number) and (number >= 0 or usual < 0)
    if own is None:
        return saved is None or isinstance(saved, bool | int | float | str)
    return isinstance(saved, type(own))


def _number(value: Any) -> float | None:
    """Return a number or a tensor of one as a float, else None."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def complete(
    optimizer: torch.optim.Optimizer, before: Sequence[Mapping[str, Any]], saved: Sequence[Any]
) -> None:
    """Give an optimiser the run's value of options that a checkpoint lacks and its class fills in, as newer ones do.

    Args:
        optimizer: whose state was loaded.
        before: its groups before.
        saved: the groups in the checkpoint.

    Raises:
        ValueError: an option is lacking, and the class has no default for it.
    """
    for group, own, stored in zip(optimizer.param_groups, before, saved, strict=True):
        for name, value in own.items():
            if name not in group:
                raise ValueError(f"its optimiser has no option {name!r}")
            if name not in stored:
                group[name] = value


def _show(value: Any) -> str:
    return str(value) if isinstance(value, int | float | tuple | None) else _got(value)
