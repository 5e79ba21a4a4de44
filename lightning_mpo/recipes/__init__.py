"""Recipes: the configuration files of the package, found by name, with the files that they include.

A recipe has a name (`quickstart`), also with its folder (`experiment/quickstart`). A file of that name takes precedence.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.recipes.yaml_files import read_mapping

FOLDER = Path(__file__).parents[1] / "configs"
"""Where the recipes are: a link to `configs/` in the repository, a folder in the wheel."""
OLD_USAGE = "lightning_mpo.yaml"
"""A configuration that exported folders may hold, and which is never run."""
SUFFIXES = (".yaml", ".yml")


def shipped() -> dict[str, Path]:
    """Return every recipe by folder and name, such as `algorithm/grpo`."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(FOLDER.glob("*/*.yaml"))}


def name_of(path: Path) -> str | None:
    """Return folder and name of a recipe; None: the file is not a recipe."""
    known = shipped().get(f"{path.parent.name}/{path.stem}")
    return (
        f"{path.parent.name}/{path.stem}"
        if known and path.is_file() and known.samefile(path)
        else None
    )


def find(name: str, folder: Path = Path(), place: str = "") -> Path:
    """Return the file that a name means: a path, or the recipe of that name.

    Args:
        name: a path, `quickstart`, or `experiment/quickstart`.
        folder: what a relative path is relative to.
        place: start of messages: the place of the name, such as "`warmup`: ".

    Raises:
        UserError: there is no such file, or the name is ambiguous.
    """
    path = Path(os.path.normpath(folder / name)) if name else folder
    if path.is_file():
        return path
    known = shipped()
    matches = [key for key in known if name in (key, key.partition("/")[2])]
    if len(matches) > 1:
        raise UserError(
            f"{place}{name!r} is the name of {len(matches)} recipes: write {_either(matches)}"
        )
    if not matches:
        kind = "configuration file" if path.suffix in SUFFIXES else "configuration file or recipe"
        raise UserError(f"{place}no {kind} {name!r}{_near(name, folder, known)}")
    beside = path.with_name(f"{path.name}.yaml")
    if beside.is_file() and not beside.samefile(known[matches[0]]):
        other = matches[0] if name != matches[0] else str(known[name])
        raise UserError(
            f"{place}{name!r} is a recipe, and there is a file {str(beside)!r} as well: write {_either([beside, other])}"
        )
    return known[matches[0]]


def _either(names: Iterable[object]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _near(name: str, folder: Path, known: Iterable[str]) -> str:
    """Suggest a file or recipe with a similar name."""
    stem = Path(name).stem.casefold()
    same = [key for key in known if key.partition("/")[2] == stem]
    if same:
        why = "a recipe has no ending: write" if Path(name).suffix in SUFFIXES else "did you mean"
        return f"; {why} {_either(same)}" + ("?" if why.startswith("did") else "")
    files = [
        path
        for pattern in ("*.yaml", "*/*.yaml", "configs/*/*.yaml")
        for path in folder.glob(pattern)
    ]
    beside = [os.path.relpath(path, folder) for path in files]
    names = beside if Path(name).suffix in SUFFIXES else []
    names = names or [*(key.partition("/")[2] for key in known), *known, *beside]
    close = difflib.get_close_matches(name.casefold(), names, n=1, cutoff=0.6)
    return (
        f"; did you mean `{close[0]}`?" if close else "; `lightning-mpo configs` lists the recipes"
    )


def read(path: Path) -> dict[str, Any]:
    """Return what a configuration file holds.

    Raises:
        UserError: it is no text, no valid YAML or no mapping.
    """
    return read_mapping(path)


def includes_of(path: Path) -> list[Path]:
    """Return the files that a file names under `include:`, which are relative to it, or recipes.

    Raises:
        UserError: the file cannot be read, or what it names is not there.
    """
    names = read(path).get("include") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path}: `include` must be a file, a recipe, or a list of these, got {names!r}"
        )
    return [find(name, path.parent, f"{path}: ") for name in names]


def warmup_of(path: Path) -> Path | None:
    """Return the stage that a file names under `warmup:`: relative to the file, or to the working folder, or a recipe.

    None: it names none, or a file that does not exist.

    Raises:
        UserError: the file cannot be read.
    """
    name = read(path).get("warmup")
    if not isinstance(name, str):
        return None
    for folder in (path.parent, Path()):
        try:
            return find(name, folder)
        except UserError:
            continue
    return None


def call(path: Path) -> str:
    """Return an argument for `-c` that means this file: the name of a recipe, or a path."""
    name = name_of(path)
    if name is None:
        return str(path)
    try:
        return name if find(name).samefile(path) else os.path.abspath(path)
    except UserError:  # a file here has that name
        return os.path.abspath(path)


def with_includes(path: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """Return a file, after all files that it includes and overlays.

    Raises:
        UserError: a file is missing or is no mapping, or files include each other.
    """
    if path.name == OLD_USAGE:
        raise UserError(
            f"{path} came with an exported folder, and configurations of others are code and not run; use "
            f"lightning-mpo predict --model {path.parent} --data FILE.jsonl"
        )
    if path in above:
        raise UserError(
            f"these files `include:` each other: {', '.join(str(other) for other in above)}"
        )
    included = [
        inner for other in includes_of(path) for inner in with_includes(other, (*above, path))
    ]
    return [*included, path]


def expand(arguments: Sequence[str]) -> list[str]:
    """Replace each `-c NAME` of a command line by its files: first those that it includes, then the file itself.

    Raises:
        UserError: a file is missing or is no mapping, or files include each other.
    """
    expanded: list[str] = []
    waiting = False  # for the value of -c
    any_file = False
    for argument in arguments:
        given = re.fullmatch(r"(?:--config=|-c=?)(.+)", argument, re.S)
        name = argument if waiting else given[1] if given else None
        if name is not None:
            any_file = True
            for path in with_includes(find(name)):
                expanded += ["-c", str(path)]
                stage = warmup_of(path)
                expanded += [f"--warmup={call(stage)}"] if stage is not None else []
            waiting = False
        elif argument in ("-c", "--config"):
            waiting = True
        else:
            expanded.append(argument)
    if waiting:
        raise UserError(
            "`-c` needs a configuration file or the name of a recipe; `lightning-mpo configs` lists them"
        )
    return (
        [*expanded, "--include=null"] if any_file else expanded
    )  # a printed configuration is whole
