"""Saves and loads rollouts, so that many settings can be scored on the same samples."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = ("texts", "rows")
"""Fields of a rollout that are not tensors."""
PREFIX = "rollout."


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of every token of a vocabulary and its id."""
    entries = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def save_rollout(
    path: str | Path,
    rollout: Rollout,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **tensors: Tensor,
) -> None:
    """Write a rollout as one safetensors file, which is never half-written.

    Tensors of the rollout are called `rollout.NAME`; texts and prompt rows are JSON under
    `rollout` in the metadata.

    Args:
        path: path of the file; missing folders are made.
        rollout: the rollout.
        tokenizer: tokenizer of its ids, if given; `load_rollout` then refuses another one.
        tensors: further tensors for the same file, by name.

    Raises:
        UserError: a prompt row cannot be written as JSON.
    """
    from safetensors.torch import save_file

    rollout_tensors = {f"{PREFIX}{name}": getattr(rollout, name) for name in _tensor_fields()}
    present_tensors = {
        name: value for name, value in (rollout_tensors | tensors).items() if value is not None
    }
    rows = [
        {item.name: _plain(getattr(row, item.name)) for item in fields(PromptRow)}
        for row in rollout.rows
    ]
    # texts and rows as JSON
    digest = None if tokenizer is None else vocabulary_digest(tokenizer)
    try:
        plain = json.dumps({"texts": rollout.texts, "rows": rows})
    except TypeError as error:
        raise UserError(f"a prompt row cannot be written to {str(path)!r}: {error}") from error
    # write under another name, then rename
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp{os.getpid()}")
    state = {
        name: value.detach().cpu().contiguous().clone() for name, value in present_tensors.items()
    }
    try:
        save_file(
            state,
            str(unfinished),
            metadata={"format": "pt", "rollout": plain} | ({"tokenizer": digest} if digest else {}),
        )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_rollout(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Rollout, dict[str, Tensor]]:
    """Read a file of `save_rollout`: the rollout, and the other tensors by name.

    Args:
        path: path of the file.
        tokenizer: tokenizer of the policy that will score the rollout; None: not compared.

    Raises:
        UserError: the file is missing or damaged, holds no complete rollout, or has ids of another
            tokenizer.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"the rollout {str(path)!r} cannot be read: {error}") from error
    # ids are those of the given tokenizer
    digest = metadata.get("tokenizer")
    if tokenizer is not None and digest is not None and digest != vocabulary_digest(tokenizer):
        raise UserError(
            f"the tokens and supports of {str(path)!r} are ids of another tokenizer than the "
            f"policy's ({len(tokenizer)} entries): score it with the model that sampled it"
        )
    try:
        values = _read_plain(metadata["rollout"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} holds no rollout: its metadata has no texts and prompt rows"
        ) from error
    # all fields, with one row per response
    for item in fields(Rollout):
        name = f"{PREFIX}{item.name}"
        if name in state:
            values[item.name] = state.pop(name)
        elif item.default is MISSING:
            raise UserError(f"{str(path)!r} holds no rollout: {item.name} is missing")
    _check_rows(path, values)
    return Rollout(**values), state


def _tensor_fields() -> list[str]:
    return [item.name for item in fields(Rollout) if item.name not in PLAIN]


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "keys") else value


def _read_plain(text: str) -> dict[str, Any]:
    plain = json.loads(text)
    rows = tuple(
        PromptRow(**{**row, "messages": tuple(row.get("messages", ()))}) for row in plain["rows"]
    )
    return {"texts": tuple(plain["texts"]), "rows": rows}


def _check_rows(path: str | Path, values: dict[str, Any]) -> None:
    """Refuse fields that differ in the number of rows, and a response mask that is not bool."""
    B = len(values["group_B"])
    for name, value in values.items():
        if (isinstance(value, Tensor) or (isinstance(value, tuple) and value)) and len(value) != B:
            raise UserError(
                f"{str(path)!r} holds no rollout: {name} has {len(value)} rows, group_B has {B}"
            )
    if values["response_mask_BT"].dtype != torch.bool:
        raise UserError(f"{str(path)!r} holds no rollout: response_mask_BT is not bool")
