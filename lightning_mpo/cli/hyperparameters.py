"""The resolved configuration as flat hyper-parameters, which trackers can list and compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 250
"""Most characters of a value; MLflow takes no more than 500 and cuts others."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return options by dotted name: a class under its option's own name, its arguments below, `init_args` left out.

    Example:
        >>> flatten({"model": {"class_path": "a.B", "init_args": {"lr": 0.1}}, "seed": 0})
        {'model': 'B', 'model.lr': 0.1, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = (
            prefix
            if key in ("init_args", "class_path") and prefix
            else f"{prefix}.{key}".lstrip(".")
        )
        if key == "class_path" and prefix:
            flat[name] = str(value).rsplit(".", 1)[-1]
        elif isinstance(value, Mapping):
            flat |= flatten(value, name)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            for i, item in enumerate(value):
                flat |= (
                    flatten(item, f"{name}.{i}")
                    if isinstance(item, Mapping)
                    else {f"{name}.{i}": _plain(item)}
                )
        else:
            flat[name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
