"""The cache of converted models: each is made once, under a lock, and compared with its checksums.

The cache is `$LIGHTNING_MPO_CACHE`, else `$XDG_CACHE_HOME/lightning-mpo`, else
`~/.cache/lightning-mpo`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from lightning_mpo.errors import UserError

CHECKSUMS = "checksums.json"
FULL = "No space left on device"


def cached(
    name: str, find: Callable[[Path], Path | None], make: Callable[[Path], tuple[str, Path]]
) -> Path:
    """Return the folder of a model; make it if it is not there.

    Processes that request the same model at the same time wait for the one that makes it.

    Args:
        name: of the lock and of temporary folders.
        find: returns the model's folder within the folder of all models; None: it is not there.
        make: makes the model within a temporary folder; returns its name and where it is.

    Raises:
        UserError: the cache cannot be written, the disk is full, or the model is damaged.
    """
    models = _cache() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {models} ({error}); set LIGHTNING_MPO_CACHE to another"
        ) from error
    with FileLock(models / f".{name}.lock"):  # the system frees it when a process dies
        folder = find(models)
        if folder is None:
            with _refuse_full_disk(models):
                folder = _make(models, name, make)
    _verify(folder)
    return folder


def _cache() -> Path:
    chosen = os.environ.get("LIGHTNING_MPO_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning-mpo"


def _make(models: Path, name: str, make: Callable[[Path], tuple[str, Path]]) -> Path:
    """Make a model and rename the result, so that a folder that exists is complete.

    The caller holds the lock of `name`.
    """
    for leftover in models.glob(f".{name}.converting-*"):  # of a process that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=models, prefix=f".{name}.converting-") as temporary:
        final_name, made = make(Path(temporary))
        files = {file.name: _size_and_digest(file) for file in sorted(made.iterdir())}
        (made / CHECKSUMS).write_text(json.dumps(files, indent=1))
        folder = models / final_name
        os.rename(made, folder)
    return folder


@contextlib.contextmanager
def _refuse_full_disk(models: Path) -> Iterator[None]:
    """Turn a full disk into one line; libraries report it in exceptions of several types."""
    try:
        yield
    except Exception as error:
        if FULL not in str(error):
            raise
        raise UserError(
            f"the disk of {models} is full, so the model was not converted and nothing of it was "
            "left there; free space, or set LIGHTNING_MPO_CACHE to a folder on another disk"
        ) from error


def _size_and_digest(file: Path) -> dict[str, int | str]:
    with file.open("rb") as handle:
        return {
            "size": file.stat().st_size,
            "sha256": hashlib.file_digest(handle, "sha256").hexdigest(),
        }


@functools.cache
def _verify(folder: Path) -> None:
    """Compare a cached model with its checksums, once per process."""
    problem = None
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        for name, recorded in expected.items():
            if (folder / name).stat().st_size != recorded["size"] or _size_and_digest(
                folder / name
            ) != recorded:
                problem = f"{name} has changed"
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"the cached model is damaged ({problem}); delete the folder {folder} and start again"
        )
