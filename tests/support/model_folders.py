"""Changes to a folder of a model, and what loading it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy

Edit = Callable[[Path], object]


def load(source: str = "model", **options) -> CausalPolicy:
    policy = CausalPolicy(source, **options)
    policy.check()
    _ = policy.tokenizer, policy.end_tokens
    policy.build(device=torch.device("cpu"), reference=False)
    return policy


def refused(**options) -> str:
    with pytest.raises(UserError) as error:
        load(**options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


def entry(file: str, **entries: object) -> Edit:
    """Set entries of a JSON file; `...` takes one out."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        content = {key: value for key, value in (content | entries).items() if value is not ...}
        (folder / file).write_text(json.dumps(content))

    return edit


def in_place(file: str, make: Callable[[Path], object]) -> Edit:
    """Put something else than a file in a file's place."""

    def edit(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Edit:
    from safetensors.torch import load_file, save_file

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return edit


def index(table: object, file: str = "a.safetensors") -> Edit:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))

    return edit
