"""One run per folder: the kernel holds the lock, and lets it go when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from lightning_mpo.errors import UserError

NAME = ".run.lock"


class FolderLock:
    """A lock on a folder, held until `release` or the end of the process.

    Args:
        folder: of the run; made where it is missing.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: int | None = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._file, 20, 0).decode(errors="replace").strip()
            os.close(self._file)
            self._file = None
            raise UserError(
                f"another run (process {owner or 'unknown'}) is writing to {str(folder)!r}: give "
                "`trainer.default_root_dir` and the loggers another folder, or wait for its end"
            ) from error
        except OSError:  # a file system without locks: nothing can be told
            return
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Let the folder go."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
