"""Applies optimiser and scheduler options that the configuration changed on resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L

from lightning_mpo.errors import UserError

MOVING = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")
"""Entries of a schedule's state that count steps."""


def optimizer_options(trainer: L.Trainer) -> dict[str, Any]:
    """Return the options of optimisers and schedules.

    Call it before training or a checkpoint has changed them.
    """
    groups = [_plain(group) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    schedules = [_plain(schedule.state_dict()) for schedule in _schedules(trainer)]
    return {
        "kinds": _kinds(trainer),
        "groups": groups,
        "schedules": [{k: v for k, v in state.items() if k not in MOVING} for state in schedules],
    }


def check_kinds(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse an optimiser or schedule whose state the checkpoint does not hold.

    Args:
        saved: options when the checkpoint's run began.
        current: options of this run.

    Raises:
        UserError: an optimiser or schedule differs; the message says which one, and the way out.
        TypeError: `groups` or `schedules` is not a list of dicts.
        ValueError: their number is not the number of this run.
    """
    for name in current["kinds"]:
        saved_kinds, current_kinds = saved["kinds"][name], current["kinds"][name]
        if saved_kinds != current_kinds:
            raise UserError(
                f"the checkpoint holds the state of {name} {_list(saved_kinds)}, and the "
                f"configuration has {_list(current_kinds)}: a run goes on as it began; for a new "
                "one from its weights give `policy.checkpoint` instead of `--ckpt_path`"
            )

    for name in ("groups", "schedules"):
        entries = saved[name]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise TypeError(f"`configured.{name}` must be a list of dicts")
        if len(entries) != len(current[name]):
            raise ValueError(
                f"`configured.{name}` must have {len(current[name])} parts, got {len(entries)}"
            )


def _kinds(trainer: L.Trainer) -> dict[str, list[str]]:
    optimizers = [f"{type(o).__name__} of {len(o.param_groups)} groups" for o in trainer.optimizers]
    return {
        "the optimiser": optimizers,
        "the schedule": [type(s).__name__ for s in _schedules(trainer)],
    }


def _list(kinds: list[str]) -> str:
    return ", ".join(kinds) or "none"


def _schedules(trainer: L.Trainer) -> list[Any]:
    """Return all schedules, each one followed by the schedules nested in it."""

    def with_nested(schedule: Any) -> Iterator[Any]:
        yield schedule
        for nested in getattr(schedule, "_schedulers", ()):
            yield from with_nested(nested)

    return [
        schedule
        for config in trainer.lr_scheduler_configs
        for schedule in with_nested(config.scheduler)
    ]


def apply_changed_options(
    trainer: L.Trainer, saved: Mapping[str, Any], current: Mapping[str, Any]
) -> list[str]:
    """Apply the changes of the configuration since the checkpoint's run began.

    The present learning rate is multiplied by the new initial rate over the saved one.

    Args:
        trainer: the trainer; its optimisers and schedules are loaded from the checkpoint.
        saved: options when the checkpoint's run began.
        current: options of this run.

    Returns:
        A line for each option that was changed.
    """
    lines = []
    # options of parameter groups
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group, before, now in zip(groups, saved["groups"], current["groups"], strict=False):
        for name, old, new in _changes(before, now):
            group[name] = group[name] * new / old if name == "lr" and old else new
            lines.append(f"optimizer {name} was {_show(old)} and is {_show(new)}")
    # options of schedules
    for schedule, before, now in zip(
        _schedules(trainer), saved["schedules"], current["schedules"], strict=False
    ):
        for name, old, new in _changes(before, now):
            setattr(schedule, name, new)
            lines.append(f"scheduler {name} was {_show(old)} and is {_show(new)}")
    return list(dict.fromkeys(lines))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [
        (name, before[name], new)
        for name, new in now.items()
        if name in before and before[name] != new
    ]


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that a configuration can hold: numbers, texts, None, lists of them."""
    return {name: value for name, value in state.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float | str) for item in value)
    return value is None or isinstance(value, int | float | str)


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
