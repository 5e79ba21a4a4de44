"""Checkpoints that are folders: torch's distributed checkpoints, with a manifest of their files.

`.metadata` says which piece of which tensor lies in which file. `meta.pt` holds everything that is
not a tensor of the model or the optimiser. `manifest.json` lists the size and the SHA-256 of each
file. The manifest detects damage. It does not detect a change on purpose, which can change it too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from lightning_mpo.errors import UserError
from lightning_mpo.storage.disk import (
    PART,
    DigestFile,
    Disk,
    beside,
    discard,
    os_error,
    put,
    sync_folder,
    unwritten,
    write_flushed,
)

METADATA, REST, MANIFEST = ".metadata", "meta.pt", "manifest.json"


def is_shards(path: Path) -> bool:
    """Return whether a path is a folder that holds any file of a checkpoint."""
    return path.is_dir() and any((path / name).exists() for name in (METADATA, REST, MANIFEST))


def has_processes() -> bool:
    """Return whether this process belongs to a group of processes."""
    return dist.is_available() and dist.is_initialized()


class _Streams(FileSystem):
    """Opens files through a `Disk`, and records the size and digest of each."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.accounts: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        with self.disk.open(Path(path)) as file:
            summed = DigestFile(file)
            yield summed
        self.accounts[Path(path).name] = summed.account

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.accounts[Path(new_path).name] = self.accounts.pop(Path(path).name)


class _Writer(dcp.FileSystemWriter):
    """Writes through a `Disk`, and leaves paths of this machine out of `.metadata`."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        super().__init__(folder)
        self.fs: _Streams = _Streams(disk)

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # the error travels to the other processes, without its cause
            raise (os_error(error) or error) from None

    def storage_meta(self) -> dcp_metadata.StorageMeta:
        return dcp_metadata.StorageMeta(save_id=self.save_id)


def write_folder(shards: dict[str, Any], rest: dict[str, Any], target: Path, disk: Disk) -> None:
    """Write a checkpoint as a folder, either completely or not at all; all processes call it.

    Args:
        shards: state dicts whose tensors are spread over the processes.
        rest: everything else in the checkpoint; the first process writes its own.
        target: the folder.
        disk: opens and renames the files.

    Raises:
        UserError: a disk is full or the folder cannot be written; raised on all processes.
    """
    # write under a temporary name beside the target
    part, first = beside(target, PART), not has_processes() or dist.get_rank() == 0
    writer = _Writer(part, disk)

    def begin() -> None:
        discard(part)
        part.mkdir(parents=True)

    def finish() -> None:
        files = {name: account for one in accounts for name, account in one.items()}
        files[REST] = write_flushed(disk, part / REST, lambda file: torch.save(rest, file))
        text = json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"
        write_flushed(disk, part / MANIFEST, lambda file: file.write(text.encode()))
        sync_folder(part)
        put(disk, part, target)

    # all processes write their shards; the first one then adds the rest, the manifest and the name
    try:
        _on_first(begin)
        dcp.save(shards, storage_writer=writer, no_dist=not has_processes())
        accounts = _gather(writer.fs.accounts)
        _on_first(finish)
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = os_error(error)
        if cause is None:
            raise
        # a failed write leaves no partial folder behind
        if first:
            with suppress(OSError):
                discard(part)
        raise UserError(unwritten(target, cause)) from error


def _gather(value: Any) -> list[Any]:
    values = [value] * (dist.get_world_size() if has_processes() else 1)
    if has_processes():
        dist.all_gather_object(values, value)
    return values


def _on_first(step: Callable[[], None]) -> None:
    """Let the first process run a step; all wait for it, and raise its `OSError` if it fails."""
    failed: list[OSError | None] = [None]
    if not has_processes() or dist.get_rank() == 0:
        try:
            step()
        except (OSError, RuntimeError) as error:
            failed = [os_error(error)]
            if failed[0] is None:
                raise
    if has_processes():
        dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]
