"""One run per folder. The kernel holds the lock, and releases it when the process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from lightning_mpo.errors import UserError

NAME = ".run.lock"


class FolderLock:
    """A lock on a folder, held until `release` or the end of the process.

    Args:
        folder: of the run. It is made if it is missing, and removed again if it stays empty.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._file: int | None = None
        while not self._take():
            pass

    def _take(self) -> bool:
        """Lock the file.

        Returns:
            False if its holder has just removed it, so that another file has to be locked.
        """
        # lock
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(file, 20, 0).decode(errors="replace").strip()
            os.close(file)
            raise UserError(
                f"another run (process {owner or 'unknown'}) is writing to "
                f"{str(self.path.parent)!r}: wait for its end, or give `trainer.default_root_dir`, "
                "the loggers and `ModelCheckpoint` another folder"
            ) from error
        except OSError:  # a file system without locks: the folder is used unlocked
            os.close(file)
            return True
        # the holder may have removed the file between opening and locking
        try:
            is_current = os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            is_current = False
        if not is_current:
            os.close(file)
            return False
        # leave the id of this process for messages
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        self._file = file
        return True

    def release(self) -> None:
        """Release the folder, and remove it if it was made here and is empty."""
        if self._file is None:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        with contextlib.suppress(OSError):  # the folder is not empty
            for folder in self._made:
                folder.rmdir()
