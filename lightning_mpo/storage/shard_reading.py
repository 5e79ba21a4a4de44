"""Reads checkpoints that are folders, as data: no code that a file names is run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.serialization import _get_layout

from lightning_mpo.errors import UserError
from lightning_mpo.storage.disk import sha256
from lightning_mpo.storage.shards import MANIFEST, METADATA, REST, has_processes

CLASSES = {(part.__module__, part.__name__): part for part in (
    dcp_metadata.Metadata, dcp_metadata.MetadataIndex, dcp_metadata.StorageMeta,
    dcp_metadata.TensorStorageMetadata, dcp_metadata.TensorProperties,
    dcp_metadata.ChunkStorageMetadata, dcp_metadata.BytesStorageMetadata,
    dcp_metadata._MEM_FORMAT_ENCODING, _StorageInfo, _get_layout,
)}  # fmt: skip
"""The classes that `.metadata` may name, besides sizes and types of tensors."""


class _Unpickler(pickle.Unpickler):
    """Reads descriptions of tensors and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in CLASSES:
            return CLASSES[module, name]
        if module.split(".")[0] == "pathlib":  # the path of the folder on the machine that wrote it
            return PurePosixPath
        value = getattr(torch, name, None) if module == "torch" else None
        if value is torch.Size or isinstance(value, torch.dtype):
            return value
        raise UserError(f"{module}.{name}")


def read_metadata(folder: Path, shown: str) -> dcp_metadata.Metadata:
    """Return the content of `.metadata`, without running code that it names.

    Args:
        folder: the checkpoint.
        shown: the user's name of the checkpoint, for messages.

    Raises:
        UserError: `.metadata` is damaged, names something other than descriptions of tensors, or
            names a file that is missing or too short.
    """
    # read the description, and the least size that it needs of each file
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        least_bytes: dict[str, int] = {}
        for info in metadata.storage_data.values():
            name = info.relative_path
            least_bytes[name] = max(least_bytes.get(name, 0), info.offset + info.length)
    except UserError as error:
        raise UserError(
            f"{shown} is refused: {METADATA} asks to run {error}, and code in files is never run"
        ) from None
    except Exception as error:
        raise UserError(
            f"{shown} is damaged: {METADATA} cannot be read ({type(error).__name__})"
        ) from error
    # compare with the files of the folder
    for name, size in sorted(least_bytes.items()):
        if Path(name).name != name:
            raise UserError(
                f"{shown} is refused: {METADATA} names {name!r}, which is outside of the folder"
            )
        if not (folder / name).is_file():
            raise UserError(f"{shown} is damaged: {name!r} is missing; take another one")
        if (folder / name).stat().st_size < size:
            raise UserError(f"{shown} is damaged: {name!r} is truncated; take another one")
    return metadata


def check_folder(folder: Path, shown: str) -> dcp_metadata.Metadata:
    """Compare a folder with its manifest; without a manifest, files only have to be long enough.

    Args:
        folder: the checkpoint.
        shown: the user's name of the checkpoint, for messages.

    Returns:
        The content of `.metadata`.

    Raises:
        UserError: a file is missing, truncated or changed.
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
    """Return everything in a folder except the tensors of model and optimiser."""
    return torch.load(folder / REST, map_location="cpu", weights_only=True)


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata` without running code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        metadata = read_metadata(Path(self.path), f"the checkpoint {str(self.path)!r}")
        metadata.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return metadata


class _Planner(DefaultLoadPlanner):
    """Reads plain values as data; torch's own planner would run code that they name."""

    def load_bytes(self, read_item: Any, value: IO[bytes]) -> None:
        plain = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)


class _AllKeysPlanner(_Planner, _EmptyStateDictLoadPlanner):
    """Reads every entry of the folder, or those under chosen keys, without a state dict to fill."""


def outline(metadata: dcp_metadata.Metadata) -> dict[str, torch.Tensor]:
    """Return the model's state dict without values, on the meta device."""
    return {
        metadata.planner_data[key][1]: torch.empty(
            item.size, dtype=item.properties.dtype, device="meta"
        )
        for key, item in metadata.state_dict_metadata.items()
        if key.startswith("state_dict.") and isinstance(item, dcp_metadata.TensorStorageMetadata)
    }


def gather_folder(folder: Path, keys: set[str] | None) -> dict[str, Any]:
    """Return complete state dicts, in the memory of this process.

    Args:
        folder: the checkpoint.
        keys: the state dicts to read; None: all.
    """
    state: dict[str, Any] = {}
    _load_state_dict(
        state, storage_reader=_Reader(folder), planner=_AllKeysPlanner(keys), no_dist=True
    )
    return state


def load_folder(
    folder: Path, module: torch.nn.Module, optimizers: list[torch.optim.Optimizer], strict: bool
) -> None:
    """Load this process's shards of a model and its optimisers; all processes call it together.

    Args:
        folder: the checkpoint.
        module: the model, sharded over the processes.
        optimizers: its optimisers.
        strict: refuse missing and unexpected keys of the model.
    """

    def load(state: dict[str, Any]) -> dict[str, Any]:
        dcp.load(
            state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=not has_processes()
        )
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
