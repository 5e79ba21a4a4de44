"""Study files and their results, read with one clear line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lightning_mpo.errors import UserError

T = TypeVar("T", int, float)


def read_study(path: Path) -> dict[str, Any]:
    """Return the content of a study file.

    Raises:
        UserError: the file is missing, or is no mapping in YAML.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"there is no study file '{path}'") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping with `tasks` and `cells`")
    return content


def section(
    content: Any,
    place: str,
    path: Path,
    *,
    needs: Iterable[str] = (),
    takes: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Return a mapping of a study file, whose keys are checked.

    Args:
        content: the mapping.
        place: its key, for messages; empty: the file.
        path: the study file.
        needs: keys that it must have.
        takes: other keys that it may have; None: any.

    Raises:
        UserError: it is no mapping, or a key is missing or unknown.
    """
    needs = tuple(needs)
    if not isinstance(content, dict):
        raise UserError(f"{path}: `{place}` must be a mapping, got {content!r}")
    for key in needs:
        if key not in content:
            raise UserError(f"{path}: {f'`{place}` needs' if place else 'the study needs'} `{key}`")
    known = None if takes is None else (*needs, *takes)
    for key in content if known is not None else ():
        if key not in known:
            where = f"`{place}`" if place else "the study"
            raise UserError(f"{path}: {where} has no key {key!r}; the keys are {', '.join(known)}")
    return content


def values(content: Any, place: str, path: Path, kind: type[T]) -> tuple[T, ...]:
    """Return a list of a study file, with its values as `kind`.

    Raises:
        UserError: it is no list of such values.
    """
    try:
        if isinstance(content, list):
            return tuple(map(kind, content))
    except (TypeError, ValueError):
        pass
    raise UserError(f"{path}: `{place}` must be a list of {kind.__name__}, got {content!r}")


def read_json(text: str, place: str, advice: str) -> Any:
    """Return the content of a JSON text.

    Raises:
        UserError: it is no JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error}; {advice}") from error
