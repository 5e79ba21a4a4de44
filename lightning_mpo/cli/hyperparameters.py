"""The resolved configuration as flat hyper-parameters, which trackers can list and compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 250
"""Most characters of a value. MLflow cuts values after 500."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return options by dotted name, without `init_args`.

    The name of an option is that of its class; the arguments of the class lie below it.

    Args:
        config: the configuration.
        prefix: dotted name of the configuration within a larger one.

    Example:
        >>> flatten({"model": {"class_path": "a.B", "init_args": {"lr": 0.1}}, "seed": 0})
        {'model': 'B', 'model.lr': 0.1, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        # the level of `class_path` and `init_args` has no name
        unnamed = key in ("init_args", "class_path") and prefix
        name = prefix if unnamed else f"{prefix}.{key}".lstrip(".")
        if key == "class_path" and prefix:
            flat[name] = str(value).rsplit(".", 1)[-1]
        elif isinstance(value, Mapping):
            flat |= flatten(value, name)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            # a list of classes: each by its position
            for i, item in enumerate(value):
                item_name = f"{name}.{i}"
                is_class = isinstance(item, Mapping)
                flat |= flatten(item, item_name) if is_class else {item_name: _plain(item)}
        else:
            flat[name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    """Return numbers and null as they are, other values as short text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
