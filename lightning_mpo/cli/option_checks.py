"""Checks of a parsed configuration, before its objects are built."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_mpo.errors import UserError
from lightning_mpo.modules.parallel import check_strategy_options
from lightning_mpo.modules.trainer_options import check_trainer_options, check_training
from lightning_mpo.recipes.tree import leaves
from lightning_mpo.storage import read_checkpoint


def check_sections(config: Any) -> None:
    """Refuse a section that is no mapping of options."""
    for section in ("trainer", "rollout"):
        if not isinstance(config.get(section), Namespace):
            raise UserError(
                f"`{section}` must be a mapping of options, got {config.get(section)!r}"
            )


def check_options(config: Any, verb: str | None, trains: bool) -> None:
    """Refuse mistakes that the parser accepts.

    Args:
        config: the options of a verb.
        verb: such as "fit"; None: the configuration has no verb.
        trains: whether the run trains.

    Raises:
        UserError: an option is wrong.
    """
    check_trainer_options(config["trainer"])
    if trains:
        check_training(config["trainer"])
    check_strategy_options(config["trainer"])
    check_checkpoint(config.get("ckpt_path"))
    if verb and config.get("weights_only") is False:
        raise UserError(
            "`weights_only: false` would run code that a checkpoint names; leave it out"
        )


def check_numbers(config: Any) -> None:
    """Refuse `.nan`: no option takes it, and it would spread into the weights."""
    for path, value in leaves(config):
        if isinstance(value, float) and math.isnan(value):
            keys = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
            name = "".join(key for key in keys if key != ".init_args").lstrip(".")
            raise UserError(f"`{name}` is .nan, which is not a number")


def holds_enum(config: Any) -> bool:
    """Return whether any value is a member of an `Enum`."""
    return any(isinstance(value, Enum) for _, value in leaves(config))


def check_checkpoint(path: str | None) -> None:
    """Refuse a checkpoint that cannot be read, before a model is loaded for it.

    Raises:
        UserError: the path does not name a file, or the file is damaged.
    """
    if path is None or path == "last":
        return
    if not Path(path).name or path in ("best", "hpc", "registry") or path.startswith("registry:"):
        raise UserError(
            f"`ckpt_path` must be `last` or a checkpoint file, got {path!r}: name the file itself"
        )
    read_checkpoint(path, "`ckpt_path`", part="outline")
