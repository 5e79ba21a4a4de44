"""Writes a checkpoint under a temporary name, flushes it, and only then gives it its name."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, Any

PART = ".part"
"""Ending of the temporary name of a checkpoint that is being written."""
BEFORE = ".before"
"""Ending of the name of a folder that is being replaced."""


class Disk:
    """Opens and renames files. Tests replace it, to kill a run before each of its calls."""

    def open(self, path: Path) -> IO[bytes]:
        """Open a file for writing."""
        return path.open("wb")

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or a folder, and flush the new name to the disk."""
        os.replace(source, target)
        sync_folder(target.parent)


class DigestFile:
    """Writes to a file, and computes the size and the SHA-256 of the written bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    @property
    def account(self) -> dict[str, Any]:
        """The file's entry in a manifest."""
        return {"size": self.size, "sha256": self.digest.hexdigest()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def write_flushed(disk: Disk, path: Path, write: Callable[[DigestFile], Any]) -> dict[str, Any]:
    """Write a file and flush it to the disk.

    Args:
        disk: opens the file.
        path: the file.
        write: writes the content to the open file.

    Returns:
        The file's entry in a manifest.
    """
    with disk.open(path) as file:
        summed = DigestFile(file)
        write(summed)
        file.flush()
        os.fsync(file.fileno())
    return summed.account


def write_text(path: Path, text: str) -> None:
    """Write a text file under its name only when it is whole; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}{PART}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def beside(path: Path, end: str) -> Path:
    """Return the hidden path beside a path, with the ending `PART` or `BEFORE`."""
    return path.with_name(f".{path.name}{end}")


def put(disk: Disk, part: Path, target: Path) -> None:
    """Give a written file or folder its name.

    A file takes the place of another in one step. A folder cannot: the one before is moved aside
    first and removed last, so that at any time one of the two is whole (`locate` finds it).
    """
    before = beside(target, BEFORE)
    if os.path.lexists(target) and (part.is_dir() or target.is_dir()):
        discard(before)
        disk.rename(target, before)
    disk.rename(part, target)
    discard(before)


def locate(path: str | Path) -> Path:
    """Return the path of a checkpoint, or of its backup if a run was killed while replacing it."""
    path = Path(path)
    if not path.name:  # the working folder, or the root
        return path
    before = beside(path, BEFORE)
    return before if before.exists() and not path.exists() else path


def unfinished_mark(path: str | Path) -> Path:
    """Return the file that exists while the stage that makes a checkpoint has not ended."""
    path = locate(path)
    return path.with_name(f".{path.name}.unfinished")


def find(folder: Path, pattern: str) -> list[Path]:
    """Return the checkpoints of a folder whose names match; a lost one is given by its backup."""
    aside = [
        path.with_name(path.name[1 : -len(BEFORE)]) for path in folder.glob(f".{pattern}{BEFORE}")
    ]
    return [locate(path) for path in sorted({*folder.glob(pattern), *aside})]


def remove(path: Path) -> None:
    """Remove a checkpoint: it loses its name first, so that no partial one has it."""
    part = beside(path, PART)
    discard(part)
    discard(beside(path, BEFORE))
    if os.path.lexists(path):
        os.replace(path, part)
        discard(part)


def discard(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path, length: int | None = None) -> str:
    """Return the SHA-256 of a file or of its first bytes; an unchanged file is read once."""
    stat = path.stat()
    return _sha256(
        path.absolute(), stat.st_size if length is None else length, (stat.st_ino, stat.st_mtime_ns)
    )


@cache
def _sha256(path: Path, left: int, stamp: tuple[int, int]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def unwritten(target: Path, cause: OSError) -> str:
    """Return the message for a checkpoint that could not be written."""
    unchanged = f"; {target} is still the one before" if locate(target).exists() else ""
    return f"the checkpoint {target} could not be written: {cause.strerror}{unchanged}"


def os_error(error: BaseException | None) -> OSError | None:
    """Return the `OSError` from which an exception was raised, on any process, if there is one."""
    if error is None or isinstance(error, OSError):
        return error
    others = [
        failure for failure, _ in getattr(error, "failures", {}).values()
    ]  # of torch's distributed checkpoints
    return next(filter(None, map(os_error, [*others, error.__cause__, error.__context__])), None)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
