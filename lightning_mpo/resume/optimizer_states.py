"""Compares optimiser states in a checkpoint with those that this run would save."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.resume.entries import shown_value

SWITCHES = ("foreach", "fused")
"""Options of optimisers that are true, false or None."""


def describe_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, str]]:
    """Return the kinds of an optimiser's states by name, for the index of each weight."""
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
    """Refuse a state that the optimiser would accept and that does not fit its weights.

    Args:
        optimizer: of the run.
        saved: its state in the checkpoint.
        described: `describe_state` at the time of the save; None: not known.
        names: of the weights, by `id`.

    Raises:
        ValueError: names the weight or the option.
    """
    # groups and their options
    states, groups = saved.get("state"), saved.get("param_groups")
    if not isinstance(states, dict) or not isinstance(groups, list):
        raise TypeError("the state of the optimiser must have `state` and `param_groups`")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"its optimiser has {len(groups)} groups of weights, the run's "
            f"{len(optimizer.param_groups)}"
        )
    weights_by_index: dict[Any, Tensor] = {}
    for group, current in zip(groups, optimizer.param_groups, strict=True):
        _check_options(group, current)
        if len(group["params"]) != len(current["params"]):
            raise ValueError(
                f"a group of its optimiser has {len(group['params'])} weights, the run's "
                f"{len(current['params'])}"
            )
        weights_by_index |= dict(zip(group["params"], current["params"], strict=True))
    # states belong to weights of the run
    shown = {place: names.get(id(weight), str(place)) for place, weight in weights_by_index.items()}
    for place, state in states.items():
        if place not in weights_by_index or not isinstance(state, dict):
            raise ValueError(f"the optimiser's state of weight {shown.get(place, place)!r} is none")
    # kinds and shapes as noted at the save
    if described is not None:
        _check_kept(states, described, shown)


def _check_kept(
    states: Mapping[Any, Mapping[str, Any]],
    described: Mapping[int, Mapping[str, str]],
    shown: Mapping[Any, str],
) -> None:
    """Compare states with the kinds noted at the save; some weights have none."""
    for place in [
        *described,
        *(place for place in states if place not in described and states[place]),
    ]:
        kinds = {str(name): _kind(value) for name, value in states.get(place, {}).items()}
        noted = described.get(place, {})
        for name in [*noted, *(name for name in kinds if name not in noted)]:
            if kinds.get(name) != noted.get(name):
                raise ValueError(
                    f"the optimiser's {name!r} of {shown.get(place, place)!r} was "
                    f"{noted.get(name, 'not there')} and is {kinds.get(name, 'not there')}"
                )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return type(value).__name__


def _check_options(saved: Any, current: Mapping[str, Any]) -> None:
    """Refuse options of a group that are of another kind than the run's."""
    if not isinstance(saved, dict) or not isinstance(saved.get("params"), list):
        raise TypeError("a group of its optimiser has no list of `params`")
    for name, value in current.items():
        if name != "params" and name in saved and not _is_option(name, saved[name], value):
            raise ValueError(
                f"the optimiser's option {name!r} must be such as {_show(value)}, got "
                f"{_show(saved[name])}"
            )


def _is_option(name: str, saved: Any, current: Any) -> bool:
    if name in SWITCHES:
        return saved is None or isinstance(saved, bool)
    if isinstance(current, bool):
        return isinstance(saved, bool)
    if isinstance(current, Sequence) and not isinstance(current, str):
        return (
            isinstance(saved, list | tuple)
            and len(saved) == len(current)
            and all(_is_option("", one, other) for one, other in zip(saved, current, strict=True))
        )
    number, usual = _number(saved), _number(current)
    if usual is not None:
        return number is not None and math.isfinite(number) and (number >= 0 or usual < 0)
    if current is None:
        return saved is None or isinstance(saved, bool | int | float | str)
    return isinstance(saved, type(current))


def _number(value: Any) -> float | None:
    """Return a number or a tensor of one as a float, else None."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def complete_options(
    optimizer: torch.optim.Optimizer, before: Sequence[Mapping[str, Any]], saved: Sequence[Any]
) -> None:
    """Set options that a checkpoint lacks, and its class fills in, to the run's values.

    Args:
        optimizer: whose state was loaded.
        before: its groups before.
        saved: the groups in the checkpoint.

    Raises:
        ValueError: an option is lacking, and the class has no default for it.
    """
    for group, current, stored in zip(optimizer.param_groups, before, saved, strict=True):
        for name, value in current.items():
            if name not in group:
                raise ValueError(f"its optimiser has no option {name!r}")
            if name not in stored:
                group[name] = value


def _show(value: Any) -> str:
    return str(value) if isinstance(value, int | float | tuple | None) else shown_value(value)
