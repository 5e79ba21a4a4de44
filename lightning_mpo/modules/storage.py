"""Checkpoint files that are whole or not there: written beside their place, checked when they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from lightning_mpo.errors import UserError

MARK = b"\nsha256:"
TAIL = len(MARK) + 64
"""Bytes behind a checkpoint's archive: readers of zip files pass over them."""
PART = ".part"
"""Ends the name under which a file is written."""


class DigestFile:
    """Passes what is written on to a file and takes its SHA-256 on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a name of its own, makes the disk keep it, and only then gives it its name.

    A run that is killed meanwhile, or a full disk, leaves the checkpoint before as it was. (Lightning's own writer goes
    through the folder for temporary files, from which a file on another disk is copied to its place.) What is read must
    be what was written, and is loaded without running any code of the file's.

    Args:
        check: called with path and content of what was read, to refuse it before anything is restored.
    """

    def __init__(self, check: Callable[[Any, dict[str, Any]], None] | None = None) -> None:
        self.check = check

    def open(self, path: Path) -> IO[bytes]:
        """Open the file that is written to."""
        return path.open("wb")

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        target = Path(path)
        part = target.with_name(f".{target.name}{PART}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.open(part) as file:
                summed = DigestFile(file)
                torch.save(checkpoint, summed)  # type: ignore[arg-type]
                file.write(MARK + summed.digest.hexdigest().encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
            sync_folder(target.parent)
        except (OSError, RuntimeError) as error:  # torch gives a failed write as a RuntimeError
            cause = os_error(error)
            if cause is None:
                raise
            part.unlink(missing_ok=True)
            kept = f"; {target} is still the one before" if target.exists() else ""
            raise UserError(f"the checkpoint {target} could not be written: {cause.strerror}{kept}") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return a checkpoint.

        Raises:
            UserError: the file is damaged, is no checkpoint, or holds objects other than tensors and plain values.
        """
        check_digest(path)
        content = read_checkpoint(path)
        if self.check is not None:
            self.check(path, content)
        return content


def os_error(error: BaseException | None) -> OSError | None:
    """Return the error of the system's that an exception was raised from."""
    if error is None or isinstance(error, OSError):
        return error
    return os_error(error.__cause__) or os_error(error.__context__)


def sync_folder(folder: Path) -> None:
    """Make the disk keep the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_digest(path: str | Path) -> None:
    """Refuse a file that is not what was written under its checksum; files without one pass.

    Raises:
        UserError: content and checksum differ.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - TAIL, 0))
        tail = file.read()
        if MARK not in tail:
            return
        file.seek(0)
        digest, left = hashlib.sha256(), size - TAIL
        while left > 0:
            block = file.read(min(left, 1 << 22))
            digest.update(block)
            left -= len(block)
    if MARK + digest.hexdigest().encode() != tail:
        raise UserError(f"the checkpoint {path} is not what was written: its checksum differs; take another one")


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Return a checkpoint by plain loading.

    Args:
        path: the file.
        mmap: leave the tensors on disk.

    Raises:
        UserError: there is no such file, it is truncated or no Lightning checkpoint, or it holds foreign objects.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        foreign = "Weights only load failed" in str(error)
        cause = (
            "it holds objects other than tensors and plain values" if foreign else "it is truncated or no checkpoint"
        )
        raise UserError(f"the checkpoint {path} cannot be read: {cause} ({type(error).__name__})") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"{path} is no Lightning checkpoint: it holds no state_dict")
    return content


@rank_zero_only
def check_folders(folders: Iterable[str | Path]) -> None:
    """Refuse folders in which no file can be made; those that are missing are made.

    Raises:
        UserError: a folder cannot be made or written.
    """
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            probe = Path(folder) / f".writable{PART}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"the folder {str(folder)!r} cannot be written ({error.strerror}): give another "
                "`trainer.default_root_dir`, `dirpath` of the checkpoints or `save_dir` of the logger"
            ) from error
