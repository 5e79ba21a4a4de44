"""Reads the description files of a model as plain data, before transformers does.

A model may come from anybody. Files that request code are refused. Each message is one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.policies.model_kinds import CAUSAL, ModelKind

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
DESCRIPTIONS = (
    *(
        CONFIG,
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
"""Small JSON files that transformers reads; each holds an object."""
LARGEST = 2**28
"""Most bytes of a JSON file; one with a vocabulary of 256 k tokens has 3·10^7."""
PLAIN_ATTENTION = (
    None,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "grouped_mm",
)


def read_json(path: Path, shown: str) -> dict[str, Any]:
    """Return the object that a file holds.

    Args:
        path: the file.
        shown: the model or folder, for messages.

    Raises:
        UserError: it is not a regular file, too large, not JSON, or not an object.
    """
    try:
        if not path.is_file():  # a pipe or a device would never end
            raise UserError(f"{shown}: {path.name} is missing, or not a regular file")
        if path.stat().st_size > LARGEST:
            raise UserError(
                f"{shown}: {path.name} has {path.stat().st_size} bytes, too many for such a file"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{shown}: {path.name} cannot be read as JSON: {error or type(error).__name__}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{shown}: {path.name} must hold an object, got {type(content).__name__}")
    return content


def read_descriptions(location: str, kind: ModelKind = CAUSAL) -> dict[str, dict[str, Any]]:
    """Return the description files of a model that exist, by name, and check them.

    Args:
        location: a folder, or an id on the hub, from which the files are fetched.
        kind: of the model; says whether its code may run.

    Raises:
        UserError: a file cannot be read, or requests code.
    """
    shown = f"the model {location!r}"
    paths = dict(_paths(location))
    descriptions = {name: read_json(path, shown) for name, path in paths.items()}
    for name, content in descriptions.items():
        _refuse_code(content, f"{shown}: {name}", kind)
    return descriptions


def _paths(location: str) -> Iterator[tuple[str, Path]]:
    names = (*DESCRIPTIONS, "adapter_config.json")
    # a folder: its files
    folder = Path(location)
    if folder.is_dir():
        yield from (
            (name, folder / name)
            for name in names
            if (folder / name).exists() or (folder / name).is_symlink()
        )
        return
    from transformers.utils import cached_file

    # an id: files of the hub, by way of its cache
    for name in names:
        try:
            path = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"the model {location!r}: {name} could not be fetched ({reason})"
            ) from error
        if path is not None:
            yield name, Path(path)


def _refuse_code(content: Any, where: str, kind: ModelKind) -> None:
    """Refuse entries, at any depth, with which transformers would import or fetch code."""
    todo = [content]
    while todo:
        part = todo.pop()
        todo += part if isinstance(part, list) else part.values() if isinstance(part, dict) else ()
        for key, value in part.items() if isinstance(part, dict) else ():
            # classes of their own
            if key in ("auto_map", "custom_pipelines") and value and not kind.remote_code:
                if kind.masked:
                    raise UserError(
                        f"{where} names code of its own (`{key}`), which runs only with "
                        "`policy.remote_code: true`; read it first, as it can do whatever you can"
                    )
                raise UserError(
                    f"{where} names code of its own (`{key}`), and code in model folders is never "
                    "run; take a model that transformers supports itself, or delete the entry from "
                    "a copy if it supports this one"
                )
            # kernels of the hub
            if re.fullmatch(r"_?(attn|experts)_implementation(_internal)?", key):
                names = value.values() if isinstance(value, dict) else [value]
                if any(name not in PLAIN_ATTENTION for name in names):
                    raise UserError(
                        f"{where} requests the kernel {value!r} (`{key}`), which would be fetched "
                        "and run; delete the entry"
                    )
            # files outside the folder
            if key == "transformers_weights" and value is not None:
                raise UserError(
                    f"{where} names another file of weights (`{key}`: {value!r}); call it {WEIGHTS}"
                )
