"""Walks through configurations: nested mappings and lists, as YAML and the parser give them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]


def value_at(tree: Any, *keys: str) -> Any:
    """Return the value under keys of nested mappings; None: there is none.

    Example:
        >>> value_at({"model": {"init_args": {"seed": 3}}}, "model", "init_args", "seed")
        3
    """
    for key in keys:
        tree = tree.get(key) if tree is not None and hasattr(tree, "get") else None
    return tree


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path and the value of each leaf; mappings, lists and tuples are not leaves.

    Example:
        >>> list(leaves({"a": [1, 2], "b": None}))
        [(('a', 0), 1), (('a', 1), 2), (('b',), None)]
    """
    if isinstance(tree, dict | Namespace):
        for key, value in (vars(tree) if isinstance(tree, Namespace) else tree).items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from leaves(value, (*path, i))
    else:
        yield path, tree


def options(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each option by its dotted path, without `class_path` and `init_args`.

    A class and a mapping are options, and their arguments follow. A list is one value; the arguments
    of its classes follow under the names of these.

    Example:
        >>> top_k = {"class_path": "objective.supports.TopK", "init_args": {"k": 8}}
        >>> [name for name, _ in options({"support": top_k, "bonus": None})]
        ['support', 'support.k', 'bonus']
    """
    if path:
        yield path, tree
    if isinstance(tree, dict):
        arguments = (tree.get("init_args") or {}) if "class_path" in tree else tree
        for key, value in arguments.items():
            yield from options(value, f"{path}.{key}" if path else str(key))
    elif is_list_of_classes(tree):
        for item in tree:
            name = item["class_path"].rsplit(".", 1)[-1]
            for key, value in (item.get("init_args") or {}).items():
                yield from options(value, f"{path}.{name}.{key}")


def is_list_of_classes(tree: Any) -> bool:
    """Return whether a value is a list of classes with options, such as loss terms."""
    return isinstance(tree, list) and all(
        isinstance(item, dict) and "class_path" in item for item in tree
    )
