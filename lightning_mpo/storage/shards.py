"""Checkpoints that are folders, with a part per process: torch's distributed checkpoints, and a manifest.

`.metadata` says which piece of which tensor is where, `meta.pt` holds what is no tensor of model or optimiser,
`manifest.json` the size and SHA-256 of each file. A manifest finds damage; who changes a file on purpose can change it too.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.serialization import _get_layout

from lightning_mpo.errors import UserError
from lightning_mpo.storage.disk import (
    PART,
    DigestFile,
    Disk,
    beside,
    discard,
    os_error,
    put,
    sha256,
    sync_folder,
    unwritten,
    write_flushed,
)

METADATA, REST, MANIFEST = ".metadata", "meta.pt", "manifest.json"
CLASSES = {(part.__module__, part.__name__): part for part in (
    described.Metadata, described.MetadataIndex, described.StorageMeta, described.TensorStorageMetadata,
    described.TensorProperties, described.ChunkStorageMetadata, described.BytesStorageMetadata,
    described._MEM_FORMAT_ENCODING, _StorageInfo, _get_layout,
)}  # fmt: skip
"""What `.metadata` may name besides sizes and types."""


def is_shards(path: Path) -> bool:
    """Return whether a path is a folder with anything of a checkpoint in it."""
    return path.is_dir() and any((path / name).exists() for name in (METADATA, REST, MANIFEST))


# --- writing ------------------------------------------------------------------------------------------------------------


class _Streams(FileSystem):
    """Files that are written through a `Disk`, and their accounts."""

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
    """Writes through a `Disk`, and puts no path into `.metadata`."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        super().__init__(folder)
        self.fs: _Streams = _Streams(disk)

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except (
            RuntimeError
        ) as error:  # travels to the other processes, without what it was raised from
            raise (os_error(error) or error) from None

    def storage_meta(self) -> described.StorageMeta:
        return described.StorageMeta(save_id=self.save_id)


def write_folder(shards: dict[str, Any], rest: dict[str, Any], target: Path, disk: Disk) -> None:
    """Write a checkpoint as a folder, whole or not at all; all processes call it in step.

    Args:
        shards: state dicts whose tensors are spread over the processes.
        rest: what else there is; that of the first process counts.
        target: the folder.
        disk: what is written through.

    Raises:
        UserError: the disk of some process is full or the folder cannot be written; on all processes.
    """
    part, first = beside(target, PART), not _together() or dist.get_rank() == 0
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

    try:
        _on_first(begin)
        dcp.save(shards, storage_writer=writer, no_dist=not _together())
        accounts = _gather(writer.fs.accounts)
        _on_first(finish)
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = os_error(error)
        if cause is None:
            raise
        if first:
            with suppress(OSError):
                discard(part)
        raise UserError(unwritten(target, cause)) from error


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gather(value: Any) -> list[Any]:
    values = [value] * (dist.get_world_size() if _together() else 1)
    if _together():
        dist.all_gather_object(values, value)
    return values


def _on_first(step: Callable[[], None]) -> None:
    """Let the first process do something; all go on when it is done, or raise what the system had against it."""
    failed: list[OSError | None] = [None]
    if not _together() or dist.get_rank() == 0:
        try:
            step()
        except (OSError, RuntimeError) as error:
            failed = [os_error(error)]
            if failed[0] is None:
                raise
    if _together():
        dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


# --- reading ------------------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Reads descriptions of tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in CLASSES:
            return CLASSES[module, name]
        if module.split(".")[0] == "pathlib":  # where the folder was written
            return PurePosixPath
        found = getattr(torch, name, None) if module == "torch" else None
        if found is torch.Size or isinstance(found, torch.dtype):
            return found
        raise UserError(f"{module}.{name}")


def read_metadata(folder: Path, shown: str) -> described.Metadata:
    """Return what `.metadata` says, without running anything that it names.

    Raises:
        UserError: it is damaged, or names anything but descriptions of tensors, or a part that is missing or too short.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            found = _Unpickler(file).load()
        needed: dict[str, int] = {}
        for info in found.storage_data.values():
            name = info.relative_path
            needed[name] = max(needed.get(name, 0), info.offset + info.length)
    except UserError as error:
        raise UserError(
            f"{shown} is refused: {METADATA} asks to run {error}, and code in files is never run"
        ) from None
    except Exception as error:
        raise UserError(
            f"{shown} is damaged: {METADATA} cannot be read ({type(error).__name__})"
        ) from error
    for name, size in sorted(needed.items()):
        if Path(name).name != name:
            raise UserError(
                f"{shown} is refused: {METADATA} names {name!r}, which is outside of the folder"
            )
        if not (folder / name).is_file():
            raise UserError(f"{shown} is damaged: {name!r} is missing; take another one")
        if (folder / name).stat().st_size < size:
            raise UserError(f"{shown} is damaged: {name!r} is truncated; take another one")
    return found


def check_folder(folder: Path, shown: str) -> described.Metadata:
    """Refuse a folder that is not what its manifest says; one without a manifest passes if its parts are long enough.

    Returns:
        What `.metadata` says.

    Raises:
        UserError: a part is missing, truncated or changed; `shown` says what the user named.
    """
    if not (folder / METADATA).is_file():
        raise UserError(f"{shown} is a folder without {METADATA}: no checkpoint")
    for name, account in _read_manifest(folder, shown).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{shown} is damaged: {name!r} is missing; take another one")
        if path.stat().st_size < account["size"]:
            raise UserError(f"{shown} is damaged: {name!r} is truncated; take another one")
        if path.stat().st_size != account["size"] or sha256(path) != account["sha256"]:
            raise UserError(
                f"{shown} is damaged: {name!r} is not what was written; take another one"
            )
    return read_metadata(folder, shown)


def _read_manifest(folder: Path, shown: str) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        return {str(name): {"size": int(a["size"]), "sha256": str(a["sha256"])}
                for name, a in json.loads(path.read_text())["files"].items()}  # fmt: skip
    except Exception as error:
        raise UserError(
            f"{shown} is damaged: {MANIFEST} cannot be read ({type(error).__name__})"
        ) from error


def load_rest(folder: Path) -> Any:
    """Return what a folder holds besides tensors of model and optimiser."""
    return torch.load(folder / REST, map_location="cpu", weights_only=True)


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata` without running anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> described.Metadata:
        found = read_metadata(Path(self.path), f"the checkpoint {str(self.path)!r}")
        found.storage_meta = described.StorageMeta(load_id=self.load_id)
        return found


class _Planner(DefaultLoadPlanner):
    """Reads plain values as plain values; torch's own planner would run what they name."""

    def load_bytes(self, read_item: Any, value: IO[bytes]) -> None:
        plain = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)


class _WholePlanner(_Planner, _EmptyStateDictLoadPlanner):
    """The same for all that the folder holds."""


def outline(found: described.Metadata) -> dict[str, torch.Tensor]:
    """Return the model's state dict without values, on the meta device."""
    return {
        found.planner_data[key][1]: torch.empty(
            item.size, dtype=item.properties.dtype, device="meta"
        )
        for key, item in found.state_dict_metadata.items()
        if key.startswith("state_dict.") and isinstance(item, described.TensorStorageMetadata)
    }


def gather_folder(folder: Path, keys: set[str] | None) -> dict[str, Any]:
    """Return state dicts in whole, in the memory of this process; with `keys`, only those."""
    state: dict[str, Any] = {}
    _load_state_dict(
        state, storage_reader=_Reader(folder), planner=_WholePlanner(keys), no_dist=True
    )
    return state


def load_folder(
    folder: Path, module: torch.nn.Module, optimizers: list[torch.optim.Optimizer], strict: bool
) -> None:
    """Load what each process has of a model and its optimisers; all processes call it in step."""

    def load(state: dict[str, Any]) -> dict[str, Any]:
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=not _together())
        return state

    module.load_state_dict(
        load({"state_dict": get_model_state_dict(module)})["state_dict"], strict=strict
    )
    for i, optimizer in enumerate(optimizers):
        name = f"optimizer_{i}"
        state = load({name: get_optimizer_state_dict(module, optimizer)})[name]
        set_optimizer_state_dict(
            module, optimizer, state, options=StateDictOptions(cpu_offload=True)
        )
