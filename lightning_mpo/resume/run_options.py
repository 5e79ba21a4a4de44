"""Reads the options of a run, and compares them with the options in a checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from inspect import Parameter, signature
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import lightning as L
import torch

from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.reference import SOURCE
from lightning_mpo.resume.option_effects import Effect, effect

TRAINER = (
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
)
PACKAGES = ("torch", "transformers", "lightning", "peft", "lightning-mpo")
NOTHING = "nothing"
"""Stands for the value of an option that one of two runs lacks."""


def run_options(trainer: L.Trainer, module: L.LightningModule, data: Any) -> dict[str, Any]:
    """Return the options of a run by path, as plain values, without loading weights.

    An option is a constructor argument that the object stores as an attribute of the same name,
    with or without a leading underscore.

    Args:
        trainer: the trainer of this run, with its callbacks.
        module: the module, which need not be built yet.
        data: the data module, or None.
    """
    # environment
    options: dict[str, Any] = {
        "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
        "threads": torch.get_num_threads(),
    }
    options |= {f"versions.{name}": _version(name) for name in PACKAGES}
    # module, data and trainer
    options |= dict(_leaves(module, "model"))
    options |= {
        f"model.policy.{key}": value
        for key, value in _contents(getattr(module, "policy", None)).items()
    }
    options |= dict(_leaves(data, "data")) | _rows(data)
    options |= {f"trainer.{name}": _plain(getattr(trainer, name, None)) for name in TRAINER}
    options |= {
        "trainer.precision": str(trainer.precision),
        "trainer.accelerator": type(trainer.accelerator).__name__,
        "trainer.strategy": type(trainer.strategy).__name__,
        "trainer.deterministic": torch.are_deterministic_algorithms_enabled(),
        "trainer.benchmark": torch.backends.cudnn.benchmark,
    }
    # callbacks, numbered if there are several of a class
    counts: dict[str, int] = {}
    for callback in callbacks_of(trainer):
        name = type(callback).__name__
        counts[name] = counts.get(name, 0) + 1
        place = (
            "rollout"
            if name == "RolloutLoop"
            else f"callbacks.{name}" + (f"[{counts[name]}]" if counts[name] > 1 else "")
        )
        leaves = dict(_leaves(callback, place))
        leaves.pop(place)  # `changed_callbacks` compares the classes
        options |= leaves
    return {
        path: value
        for path, value in options.items()
        if effect(path) not in ("none", "compared elsewhere")
    }


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], selected_effect: Effect
) -> list[tuple[str, Any, Any]]:
    """Return (option, saved value, present value) of options that differ, for one effect.

    If an object is new, gone or of another class, its options are not listed as well. New and
    missing callbacks are left to `changed_callbacks`.

    Args:
        saved: options in the checkpoint, by path.
        current: options of this run, by path.
        selected_effect: only options with this effect are returned.
    """
    paths = {**saved, **current}
    changes = [
        (path, saved.get(path, NOTHING), current.get(path, NOTHING))
        for path in paths
        if saved.get(path, NOTHING) != current.get(path, NOTHING)
        and (effect(path) or "reported") == selected_effect
    ]
    # without new and missing callbacks
    changes = [
        change
        for change in changes
        if not change[0].startswith("callbacks.") or NOTHING not in change
    ]
    # without the options of objects that changed themselves
    objects = [path for path, *_ in changes if any(other.startswith(f"{path}.") for other in paths)]
    return [
        change
        for change in changes
        if not any(change[0].startswith(f"{path}.") for path in objects)
    ]


def changed_callbacks(saved: list[str], trainer: L.Trainer) -> list[str]:
    """Return a line for each callback that is gone or new, if it has a state or an effect."""
    now = {type(callback).__name__: callback for callback in callbacks_of(trainer)}
    gone = [name for name in saved if name not in now and effect(f"callbacks.{name}") != "none"]
    new = [
        name
        for name, callback in now.items()
        if name not in saved
        and (
            effect(f"callbacks.{name}") != "none"
            or type(callback).state_dict is not L.Callback.state_dict
        )
        and not name.endswith("Checkpoint")
    ]
    return [f"{name} was there and is gone" for name in gone] + [
        f"{name} is new and begins afresh" for name in new
    ]


def shown(path: str) -> str:
    """Return the name of an option for messages."""
    return path.removeprefix("callbacks.").removeprefix("versions.")


# --- reading options ------------------------------------------------------------------------


def _leaves(value: Any, place: str, above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield path and plain value of each option of an object, and of objects nested in it."""
    if _is_plain(value):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{place}.{key}", above)
    elif isinstance(value, list | tuple | set | frozenset):
        for i, item in enumerate(
            sorted(value, key=str) if isinstance(value, set | frozenset) else value
        ):
            yield from _leaves(item, f"{place}[{i}]", above)
    elif isinstance(value, Path | torch.dtype | torch.device):
        yield place, str(value)
    elif isinstance(value, FunctionType | MethodType | type):
        yield place, f"{value.__module__}.{value.__qualname__}"
    elif id(value) not in above:
        yield place, type(value).__name__
        for name in _arguments(type(value)):
            inner = getattr(value, name, getattr(value, f"_{name}", _MISSING))
            if inner is not _MISSING:
                yield from _leaves(inner, f"{place}.{name}", (*above, id(value)))


_MISSING = object()


def _arguments(kind: type) -> list[str]:
    """Return the names of a class's arguments, and of arguments passed to its bases."""
    names: list[str] = []
    for part in kind.__mro__[:-1]:
        if "__init__" not in vars(part):
            continue
        parameters = list(signature(vars(part)["__init__"]).parameters.values())[1:]
        kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_ONLY)
        names += [p.name for p in parameters if p.kind in kinds and p.name not in names]
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
            break
    return names


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    return value if _is_plain(value) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _contents(policy: Any) -> dict[str, Any]:
    """Return digests of a policy's files, from which a resumed run builds its reference."""
    if not isinstance(policy, LoadedPolicy):
        return {}
    digests: dict[str, Any] = {}
    if policy.lora is None:  # with adapters it is part of the identity
        digests["source_content"] = policy.base_digest
    if policy.checkpoint is not None:
        digests["checkpoint_content"] = _file_digest(Path(policy.checkpoint))
    reference = policy.reference_checkpoint
    if reference is not None:
        digests["reference_content"] = (
            SOURCE if reference == SOURCE else _file_digest(Path(reference))
        )
    return digests


def _file_digest(path: Path) -> str | None:
    """Return a digest of the size and the last 64 KiB of a file, or of each file in a folder.

    The end of a checkpoint holds its checksum. A path that does not exist has no digest.
    """
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''} {size}".encode())
        with file.open("rb") as handle:
            handle.seek(max(size - (1 << 16), 0))
            digest.update(handle.read())
    return digest.hexdigest()[:12] if path.exists() else None


def _rows(data: Any) -> dict[str, Any]:
    """Return counts and the digest of the rows that a data module serves."""
    identity = getattr(data, "identity", None)
    if identity is None:
        return {}
    data_identity = identity()
    return {"data.digest": data_identity["digest"]} | {
        f"data.rows.{name}": count for name, count in data_identity["rows"].items()
    }
