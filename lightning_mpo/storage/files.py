"""Checkpoints of one file: torch's archive, followed by its SHA-256."""

from __future__ import annotations

import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lightning_mpo.errors import UserError
from lightning_mpo.storage.disk import (
    PART,
    Disk,
    beside,
    discard,
    os_error,
    put,
    sha256,
    unwritten,
    write_flushed,
)

MARK = b"\nsha256:"
TAIL = len(MARK) + 64
"""Bytes behind the archive. Readers of zip files ignore them."""


def write_file(content: dict[str, Any], target: Path, disk: Disk) -> None:
    """Write a checkpoint as one file, completely or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    part = beside(target, PART)

    def write(file: Any) -> None:
        torch.save(content, file)
        file.write(MARK + file.digest.hexdigest().encode())

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(disk, part, write)
        put(disk, part, target)
    except (OSError, RuntimeError) as error:  # torch gives a failed write as a RuntimeError
        cause = os_error(error)
        if cause is None:
            raise
        with suppress(OSError):
            discard(part)
        raise UserError(unwritten(target, cause)) from error


def check_file(path: Path, shown: str) -> None:
    """Compare a file with its checksum, or without one with the checksums of its archive.

    Raises:
        UserError: content and checksum differ. The message begins with `shown`.
    """
    tail = _tail(path)
    if MARK in tail:
        if MARK + sha256(path, path.stat().st_size - TAIL).encode() != tail:
            raise UserError(
                f"{shown} is not what was written: its checksum differs; take another one"
            )
    elif zipfile.is_zipfile(path):  # torch does not look at checksums
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise UserError(
                f"{shown} is damaged: the checksum of {broken!r} in it is wrong; take another one"
            )


def is_sealed(path: Path) -> bool:
    """Return whether a checkpoint holds a checksum of its content; a folder always does."""
    return path.is_dir() or MARK in _tail(path)


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL, 0))
        return file.read()
