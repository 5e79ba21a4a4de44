"""Checks of the trainer's numbers that Lightning would misread, or refuse only later."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning as L

from lightning_mpo.checks import above, at_least, not_below, one_of, within
from lightning_mpo.errors import UserError
from lightning_mpo.modules.monitors import check_callbacks

MOST_UPDATES = 10**12
MOST_DEVICES, MOST_NODES = 1024, 100_000
_COUNTS: dict[str, tuple[int, int]] = {
    "max_steps": (-1, MOST_UPDATES),
    "min_steps": (0, MOST_UPDATES),
    "max_epochs": (-1, MOST_UPDATES),
    "min_epochs": (0, MOST_UPDATES),
    "num_nodes": (1, MOST_NODES),
    "accumulate_grad_batches": (1, 1_000_000),
    "check_val_every_n_epoch": (1, MOST_UPDATES),
    "num_sanity_val_steps": (-1, MOST_UPDATES),
    "log_every_n_steps": (0, MOST_UPDATES),
    "reload_dataloaders_every_n_epochs": (0, MOST_UPDATES),
    "fast_dev_run": (0, MOST_UPDATES),
}
"""Smallest and largest values of options that are whole numbers."""
_SHARES = (
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "overfit_batches",
)
"""Options that are a share from 0.0 to 1.0, or a whole number."""


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """Refuse options of the trainer that are out of range.

    Args:
        options: options by name, as in `trainer:`; missing ones and null are not checked.

    Raises:
        UserError: an option is out of its range.
    """
    for name, (least, most) in _COUNTS.items():
        if not isinstance(options.get(name), bool):
            at_least("trainer", least, most=most, **{name: options.get(name)})
    for name in _SHARES:
        _check_share(name, options.get(name))
    _check_devices(options.get("devices"))
    every = options.get("val_check_interval")
    if isinstance(every, int) and not isinstance(every, bool):
        at_least("trainer", 1, most=MOST_UPDATES, val_check_interval=every)
    elif isinstance(every, float):
        above("trainer", 0, val_check_interval=every)
        within("trainer", "(0, 1]", val_check_interval=every)
    note = "; 0 or null clips nothing" if options.get("gradient_clip_val") != 0 else ""
    not_below("trainer", 0, note=note, gradient_clip_val=options.get("gradient_clip_val"))
    one_of(
        "trainer",
        ("norm", "value", None),
        gradient_clip_algorithm=options.get("gradient_clip_algorithm"),
    )


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse numbers of a trainer that was built in Python.

    The command line has checked its own already.

    Raises:
        UserError: an option is out of range.
    """
    if getattr(getattr(trainer, "state", None), "fn", None) in (None, "fit"):
        check_callbacks(trainer)
    names = ("gradient_clip_val", "accumulate_grad_batches", "log_every_n_steps")
    check_trainer_options({name: getattr(trainer, name, None) for name in names})


def check_training(options: Mapping[str, Any]) -> None:
    """Refuse limits with which `fit` would train nothing and still succeed.

    Raises:
        UserError: a limit is 0, or a time limit is not positive.
    """
    if _is_no_time(options.get("max_time")):
        raise UserError(
            f"`trainer.max_time` must be positive, got {options['max_time']!r}: it would train "
            "nothing"
        )
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if options.get(name) == 0 and not isinstance(options.get(name), bool):
            raise UserError(
                f"`trainer.{name}: 0` trains nothing; use the verb `validate` to look at a policy"
            )


def _is_no_time(limit: Any) -> bool:
    """Return whether a time limit is 0; Lightning refuses one that it cannot read."""
    if isinstance(limit, str):
        return bool(re.fullmatch(r"[0:]*0[0:]*", limit.strip()))
    if isinstance(limit, Mapping):
        try:
            limit = timedelta(**limit)
        except (TypeError, OverflowError):
            return False
    return isinstance(limit, timedelta) and limit <= timedelta(0)


def _check_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, int):
        at_least("trainer", 0, most=MOST_UPDATES, **{name: value})
    else:
        within("trainer", "[0, 1]", **{name: value})


def _check_devices(devices: Any) -> None:
    if isinstance(devices, int | float) and devices != -1:
        at_least("trainer", 1, most=MOST_DEVICES, devices=devices)
    if isinstance(devices, str) and devices != "auto":
        numbers = [part.strip() for part in devices.split(",") if part.strip()]
        if not numbers or not all(
            part.lstrip("-").isascii() and part.lstrip("-").isdigit() for part in numbers
        ):
            raise UserError(
                f"`trainer.devices` must be a number, a list of numbers or `auto`, got {devices!r}"
            )
    if isinstance(devices, list):
        if not devices:
            raise UserError("`trainer.devices` is an empty list; name one device at least")
        for device in devices:
            at_least("trainer", 0, most=MOST_DEVICES, devices=device)
        if len(set(devices)) != len(devices):
            raise UserError(f"`trainer.devices` names a device twice: {devices}")
