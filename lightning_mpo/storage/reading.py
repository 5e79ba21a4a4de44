"""The only reader of checkpoints. Files and folders are read as data, and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.api import CheckpointException

from lightning_mpo.errors import UserError
from lightning_mpo.storage.disk import locate
from lightning_mpo.storage.files import check_file
from lightning_mpo.storage.shard_reading import (
    check_folder,
    gather_folder,
    load_rest,
    outline,
)

Part = Literal["outline", "weights", "all"]


def read_checkpoint(
    path: str | Path, name: str = "the checkpoint", part: Part = "all"
) -> dict[str, Any]:
    """Return a Lightning checkpoint, a file or a folder, as tensors and plain values.

    A checkpoint that asks for code is refused.

    Args:
        path: the file or the folder.
        name: name of the checkpoint in messages, such as "`ckpt_path`".
        part: "outline" leaves tensors on the disk: those of a file are mapped, those of a folder
            have no values; "weights" leaves out the optimisers of a folder.

    Raises:
        UserError: there is none, it is damaged or no Lightning checkpoint, or reading it would run
            code.
    """
    path, shown = locate(path), f"{name} {str(path)!r}"
    if not path.exists():
        raise UserError(f"{shown} does not exist")
    with reading(shown):
        if path.is_dir():
            return _read_folder(path, shown, part)
        check_file(path, shown)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=part == "outline")
        _check(content, shown)
        if not isinstance(content.get("state_dict"), dict):
            raise UserError(
                f"{shown} cannot be read as a Lightning checkpoint: it holds no state_dict"
            )
        check_entries(content, shown)
        return content


def _read_folder(folder: Path, shown: str, part: Part) -> dict[str, Any]:
    metadata = check_folder(folder, shown)
    content = load_rest(folder)
    _check(content, shown)
    check_entries(content, shown)
    if part == "outline":
        return content | {"state_dict": outline(metadata)}
    state = gather_folder(folder, {"state_dict"} if part == "weights" else None)
    _check(state.get("state_dict"), shown)
    count = sum(key.startswith("optimizer_") for key in state)
    optimizers = [state[f"optimizer_{i}"] for i in range(count)]
    return content | {"state_dict": state["state_dict"], "optimizer_states": optimizers}


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(number, int | float) for number in value.values()
    )


def _dicts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, dict) for part in value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "state_dict": (
        lambda value: (
            isinstance(value, dict)
            and all(
                isinstance(name, str) and isinstance(weight, torch.Tensor)
                for name, weight in value.items()
            )
        ),
        "tensors by name",
    ),
    "epoch": (_count, "a count"),
    "global_step": (_count, "a count"),
    "pytorch-lightning_version": (
        lambda value: isinstance(value, str) and re.match(r"\d+\.\d+", value) is not None,
        "a version",
    ),
    "loops": (
        lambda value: (
            isinstance(value, dict) and all(isinstance(part, dict) for part in value.values())
        ),
        "a dict of dicts",
    ),
    "callbacks": (lambda value: isinstance(value, dict), "a dict"),
    "optimizer_states": (_dicts, "a list of dicts"),
    "lr_schedulers": (_dicts, "a list of dicts"),
    "hyper_parameters": (lambda value: isinstance(value, dict), "a dict"),
    "rollout_metrics": (_numbers, "numbers by name"),
    "progress_bar": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
    "mtp": (lambda value: value is None or isinstance(value, dict), "a dict or None"),
    "kl_coefficient": (lambda value: isinstance(value, int | float), "a number"),
}
"""Check and kind of each entry that a checkpoint may have."""


def check_entries(content: dict[str, Any], shown: str) -> None:
    """Refuse a checkpoint with an entry of another kind than Lightning or this package saves.

    Raises:
        UserError: an entry is of another kind. The message begins with `shown`.
    """
    for name, (check, kind) in ENTRIES.items():
        if name in content and not check(content[name]):
            got = type(content[name]).__name__
            raise UserError(
                f"{shown} is damaged: its entry {name!r} must be {kind}, got {got}; take another "
                "one"
            )


def _check(content: Any, shown: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{shown} cannot be read as a Lightning checkpoint: it holds no dict")


@contextmanager
def reading(shown: str) -> Generator[None, None, None]:
    """Turn an error of reading into one line.

    Raises:
        UserError: the checkpoint is truncated, is none, or asks for code. The message begins with
            `shown`.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it asks to run {code[1]}, and code in files is never run"
            if code
            else f"it is truncated or none ({type(error).__name__})"
        )
        raise UserError(f"{shown} cannot be read as a Lightning checkpoint: {reason}") from error
