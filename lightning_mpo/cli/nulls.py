"""`null` as a value: given on the command line, and refused for options that take none."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import Parameter
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import Namespace

from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.cli.classes import imported_class
from lightning_mpo.errors import UserError


def nulls_as_files(words: Sequence[str]) -> list[str]:
    """Replace `--model.… null` by the text of a configuration file that holds the null.

    The parser turns a null within two classes into the text "None", such as the path of a
    checkpoint. In a file it stays null.

    Args:
        words: of a command line.

    Example:
        >>> nulls_as_files(["fit", "--model.policy.checkpoint", "null"])
        ['fit', '--config', '{"model": {"policy": {"checkpoint": null}}}']
    """
    result: list[str] = []
    rest = list(reversed(words))
    while rest:
        # an option with its value behind `=`, or in the next word
        word = rest.pop()
        name, equals, value = word.partition("=")
        behind = not equals and rest[-1:] == ["null"]
        if not name.startswith("--model.") or name.endswith("+") or not (behind or value == "null"):
            result.append(word)
            continue
        if behind:
            rest.pop()
        section: Any = None
        for key in reversed(name.removeprefix("--").split(".")):
            section = {key: section}
        result += ["--config", json.dumps(section)]
    return result


def check_nulls(config: Any) -> None:
    """Refuse `null` for an argument of a class of this package whose type does not include it.

    Args:
        config: the options of a verb.

    Raises:
        UserError: an option is null, and must not be.
    """
    for path, owner, arguments in _objects(config):
        for name, value in arguments.items():
            if value is None and not takes_null(owner, name):
                expected = getattr(hint_of(owner, name), "__name__", "given")
                raise UserError(f"`{path}.{name}`: must be {expected}, got null")


def takes_null(owner: type, name: str) -> bool:
    """Return whether an argument of a class may be None; True where nothing says so.

    Example:
        >>> from lightning_mpo.objective.surrogates import ClippedRatio
        >>> takes_null(ClippedRatio, "low"), takes_null(ClippedRatio, "dual")
        (False, True)
    """
    hint = hint_of(owner, name)
    return hint in (None, Any, object) or isinstance(hint, TypeVar) or NoneType in get_args(hint)


def hint_of(owner: type, name: str) -> Any:
    """Return the type of an argument; None: it is not known, or its default is None."""
    for base in owner.__mro__:
        constructor: Any = vars(base).get("__init__")
        parameter = constructor and inspect.signature(constructor).parameters.get(name)
        if not parameter:
            continue
        if parameter.default is None or parameter.annotation is Parameter.empty:
            return None
        try:
            return get_type_hints(constructor).get(name)
        except NameError:  # a type that is imported for type checkers alone
            return None
    return None


def _objects(config: Any) -> Iterator[tuple[str, type, Mapping[str, Any]]]:
    """Yield path, class and arguments of each object of a class of this package."""
    for section, value in _items(config):
        yield from _walk(value, section, RolloutLoop if section == "rollout" else None)


def _walk(value: Any, path: str, owner: Any) -> Iterator[tuple[str, type, Mapping[str, Any]]]:
    """Yield the objects of a value; `owner` is the class of a mapping without `class_path`."""
    if isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _walk(part, f"{path}[{i}]", None)
    arguments = dict(_items(value))
    if isinstance(arguments.get("class_path"), str):
        owner = imported_class(arguments["class_path"])
        arguments = dict(_items(arguments.get("init_args")))
    # a class of this package -> its arguments
    known = isinstance(owner, type) and owner.__module__.startswith("lightning_mpo.")
    if known:
        yield path, owner, arguments
    for name, part in arguments.items():
        yield from _walk(part, f"{path}.{name}", hint_of(owner, name) if known else None)


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Namespace):
        return vars(value).items()
    return value.items() if isinstance(value, dict) else ()
