"""Compares the weight files of a model with its description, from their headers alone.

Files that lead out of their folder, and descriptions of other sizes than the weights, are refused
before a model is built. Each message is one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.policies.model_files import CONFIG, WEIGHTS, read_json

INDEX = "model.safetensors.index.json"
DEEPEST = 10_000
"""Most layers, if the weights are not on this machine to compare with."""
LAYERS = (
    r"(n|num|encoder|decoder|num_hidden|num_encoder|num_decoder|n_encoder|n_decoder)_?layers?"
    r"|num_nextn_predict_layers"
)
FIRST = (
    r"num_hidden_layers|n_layers?|max_position_embeddings|n_positions|vocab_size|hidden_size|n_embd"
)
SIZES = (
    r"layer|expert|head|hidden|vocab|intermediate|dim|width|inner|embd|ffn|block|rank|state_size"
    r"|kernel"
)
POSITIONS = r"position|window|max_seq|ctx|context"


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a model folder, from the headers of its safetensors files.

    Raises:
        UserError: there is no such file, or one is damaged, missing or outside the folder.
    """
    from safetensors import safe_open

    shown = f"the model {str(folder)!r}"
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensors in _weight_files(folder, shown).items():
        try:
            with safe_open(str(folder / name), "pt") as file:
                keys = file.keys()
                held = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
        except Exception as error:
            raise UserError(
                f"{shown}: {name} cannot be read as safetensors: {_first_line(error)}"
            ) from error
        missing = sorted(set(tensors) - set(held))
        if missing:
            raise UserError(
                f"{shown}: {INDEX} says that {name} holds {missing[0]!r}, which it does not"
            )
        shapes |= held
    return shapes


def check_dtypes(network: Any, folder: Path) -> None:
    """Refuse files that hold whole numbers for a weight; they would be read without a scale.

    Args:
        network: the model on the meta device.
        folder: of the model, whose files can be read.

    Raises:
        UserError: names the weight.
    """
    from safetensors import safe_open

    weights = {name for name, weight in network.named_parameters() if weight.is_floating_point()}
    # files of a base model leave the first part of each name out
    endings = {name.partition(".")[2] for name in weights}
    for file_name in _weight_files(folder, f"the model {str(folder)!r}"):
        with safe_open(str(folder / file_name), "pt") as file:
            for name in file.keys():  # noqa: SIM118
                kind = file.get_slice(name).get_dtype()
                if re.match(r"[IUB](\d|OOL)", kind) and (name in weights or name in endings):
                    raise UserError(
                        f"the model {str(folder)!r}: {name!r} in {file_name} holds whole numbers "
                        f"({kind}), and {CONFIG} names no quantisation that says their scale; take "
                        "a folder with float weights"
                    )


def _weight_files(folder: Path, shown: str) -> dict[str, list[str]]:
    """Return the weight files of a folder, each with the tensors that the index names for it."""
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: []}
    # no safetensors at all
    if not (folder / INDEX).is_file():
        others = sorted(
            path.name
            for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
            for path in folder.glob(kind)
        )
        hint = (
            f"; {others[0]} is a pickle, which is code, and is never read: convert it where you "
            "trust it (`save_pretrained` of transformers writes safetensors)"
            if others
            else ""
        )
        raise UserError(f"{shown} has no {WEIGHTS} and no {INDEX}{hint}")
    # a weight in several files: the index names the file of each tensor
    table = read_json(folder / INDEX, shown).get("weight_map")
    if (
        not isinstance(table, dict)
        or not table
        or not all(isinstance(name, str) for name in table.values())
    ):
        raise UserError(
            f"{shown}: `weight_map` of {INDEX} must say for each tensor which file holds it"
        )
    # only files of this folder
    files: dict[str, list[str]] = {}
    for tensor, name in table.items():
        files.setdefault(name, []).append(tensor)
    for name in sorted(files):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(
                f"{shown}: {INDEX} names {name!r}, which is not a safetensors file of this folder"
            )
        if not (folder / name).is_file():
            raise UserError(f"{shown}: {INDEX} names {name!r}, which is missing")
    return files


def check_declared_sizes(
    config: Mapping[str, Any], location: str, shapes: Mapping[str, tuple[int, ...]] | None
) -> None:
    """Refuse sizes in `config.json` that contradict the weights, before a model is built from it.

    Args:
        config: content of `config.json`.
        location: folder or id of the model, for messages.
        shapes: shapes of its tensors; None: not known.

    Raises:
        UserError: a size is negative, or larger than the weights allow.
    """
    numbers = None if shapes is None else sum(math.prod(shape) for shape in shapes.values())
    deepest = DEEPEST if shapes is None else len(shapes) + 64
    # every whole number in the configuration and in the mappings within
    todo: list[Any] = [config]
    while todo:
        part = todo.pop()
        todo += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            where = f"the model {location!r}: `{key}` of {CONFIG} is {value}"
            # counts of layers, sizes of at least 1, positions, and all other sizes
            if re.fullmatch(LAYERS, key) and value > deepest:
                held = "" if shapes is None else f" for weights of {len(shapes)} tensors"
                raise UserError(f"{where}, too many{held}")
            if re.fullmatch(FIRST, key) and value < 1:
                raise UserError(f"{where}; it must be at least 1")
            if re.search(POSITIONS, key):
                if value >= 2**31:
                    raise UserError(f"{where}, too many")
            elif re.search(SIZES, key) and value > (
                2**40 if numbers is None else max(8 * numbers, 2**20)
            ):
                held = "" if numbers is None else f" for weights of {numbers} numbers"
                raise UserError(f"{where}, too many{held}")


def check_shapes(network: Any, shapes: Mapping[str, tuple[int, ...]], location: str) -> None:
    """Refuse weights with other shapes than those of the described model.

    Args:
        network: the model on the meta device.
        shapes: shapes of the tensors in its files.
        location: folder or id of the model, for messages.

    Raises:
        UserError: a tensor has another shape or no layer, or the model is much larger than its
            files.
    """
    where = f"the model {location!r}: {CONFIG} and weights do not agree"
    # shapes
    weights = dict(network.named_parameters())
    for name, weight in weights.items():
        if name in shapes and shapes[name] != tuple(weight.shape):
            raise UserError(
                f"{where}: {name!r} is {list(weight.shape)} by the description and "
                f"{list(shapes[name])} in the file"
            )
    # tensors of further layers: a number in the name stands for any
    placed = {re.sub(r"\.\d+\.", ".N.", name) for name in weights}
    extra = [
        name for name in shapes if name not in weights and re.sub(r"\.\d+\.", ".N.", name) in placed
    ]
    ignored = [
        re.compile(rule)
        for rule in getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    extra = [name for name in extra if not any(rule.search(name) for rule in ignored)]
    if extra:
        raise UserError(
            f"{where}: the files hold {extra[0]!r}, for which the described model has no layer"
        )
    # sizes as a whole
    described = sum(weight.numel() for weight in weights.values())
    held = sum(map(math.prod, shapes.values()))
    buffers = sum(buffer.numel() for buffer in network.buffers())
    if described > 2 * held + 2**20:
        raise UserError(
            f"{where}: the description has {described} numbers and the files hold {held}"
        )
    if buffers > 4 * held + 2**30:
        raise UserError(
            f"{where}: the description has tables of {buffers} numbers beside {held} weights"
        )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
