"""The run that an exported policy comes from, as far as it is known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_mpo import recipes
from lightning_mpo.errors import UserError
from lightning_mpo.recipes.headers import Method, read
from lightning_mpo.recipes.tree import is_list_of_classes, options, value_at


@dataclass(frozen=True)
class Origin:
    """A run, as far as it is known."""

    config: dict[str, Any] | None = None  # whole, as `config.yaml` holds it
    updates: int | None = None
    rollouts: int | None = None
    summary: dict[str, Any] | None = None  # of `Report`

    @property
    def objective(self) -> dict[str, Any] | None:
        """The axes, as configured."""
        return value_at(self.config, "model", "init_args", "objective")


def read_yaml(path: Path) -> dict[str, Any] | None:
    """Return a mapping, or None where there is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def read_summary(run: Path) -> dict[str, Any] | None:
    """Return the evaluations of `Report`, or None."""
    try:
        return json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def find_method(objective: dict[str, Any]) -> tuple[Method, dict[str, tuple[Any, Any]]] | None:
    """Return the algorithm file with an objective's choices, and the values that differ from it.

    Algorithm files are looked for in `configs/algorithm` here and among the recipes. None: no file
    makes these choices.

    Returns:
        the file, and by argument the objective's value and the file's.
    """
    values = _choices(objective)
    choices = {key: value for key, value in values.items() if "." not in key}
    candidates: list[tuple[Method, dict[str, tuple[Any, Any]]]] = []
    for folder in dict.fromkeys(root / "algorithm" for root in (Path("configs"), recipes.FOLDER)):
        # a folder without a file of these choices leaves the search to the next
        for path in sorted(folder.glob("*.yaml")) if not candidates else ():
            try:
                method = read(path)
            except UserError:
                continue
            in_file = _choices(method.choices)
            if choices == {key: value for key, value in in_file.items() if "." not in key}:
                pairs = {key: (values.get(key), in_file.get(key)) for key in {**values, **in_file}}
                differences = {key: pair for key, pair in pairs.items() if not _same(*pair)}
                candidates.append((method, differences))
    return min(candidates, key=lambda pair: len(pair[1]), default=None)


def _same(value: Any, in_file: Any) -> bool:
    return value == in_file or (isinstance(in_file, str) and in_file.startswith("${"))


def short(value: Any) -> Any:
    """Return the name of a class without its module."""
    return value.rsplit(".", 1)[-1] if isinstance(value, str) else value


def _choices(objective: Any) -> dict[str, Any]:
    """Return choices and arguments: `support` is `TopK`, `support.k` is 8, `terms` "ValueLoss"."""
    return {path: _name(value) for path, value in options(objective) if value not in (None, [])}


def _name(value: Any) -> Any:
    """Return a plain value, or the names of classes."""
    if is_list_of_classes(value):
        return ", ".join(short(item["class_path"]) for item in value)
    return short(value.get("class_path", "set")) if isinstance(value, dict) else value
