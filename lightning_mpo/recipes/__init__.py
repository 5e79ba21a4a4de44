"""Recipes: the configuration files of the package, found by name, with the files that they include.

A recipe has a name (`quickstart`), also with its folder (`experiment/quickstart`). A file of that
name takes precedence.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.recipes.yaml_files import read_mapping

FOLDER = Path(__file__).parents[1] / "configs"
"""Folder of the recipes: a link to `configs/` in the repository, a real folder in the wheel."""
OLD_USAGE = "lightning_mpo.yaml"
"""A configuration in exported folders of earlier versions. It is never run."""
SUFFIXES = (".yaml", ".yml")


def shipped() -> dict[str, Path]:
    """Return every recipe by folder and name, such as `algorithm/grpo`."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(FOLDER.glob("*/*.yaml"))}


def name_of(path: Path) -> str | None:
    """Return folder and name of a recipe; None: the file is not a recipe."""
    name = f"{path.parent.name}/{path.stem}"
    recipe = shipped().get(name)
    return name if recipe and path.is_file() and recipe.samefile(path) else None


def find(name: str, folder: Path = Path(), place: str = "") -> Path:
    """Return the file that a name means: a path, or the recipe of that name.

    Args:
        name: a path, `quickstart`, or `experiment/quickstart`.
        folder: a relative path is relative to it.
        place: beginning of messages, such as "`warmup`: ".

    Raises:
        UserError: there is no such file, or the name is ambiguous.
    """
    # a file
    path = Path(os.path.normpath(folder / name)) if name else folder
    if path.is_file():
        return path
    # a recipe
    known = shipped()
    matches = [key for key in known if name in (key, key.partition("/")[2])]
    if len(matches) > 1:
        raise UserError(
            f"{place}{name!r} is the name of {len(matches)} recipes: write {_either(matches)}"
        )
    if not matches:
        kind = "configuration file" if path.suffix in SUFFIXES else "configuration file or recipe"
        raise UserError(f"{place}no {kind} {name!r}{_near(name, folder, known)}")
    # a recipe, and a file that may be meant instead
    beside = path.with_name(f"{path.name}.yaml")
    if beside.is_file() and not beside.samefile(known[matches[0]]):
        other = matches[0] if name != matches[0] else str(known[name])
        raise UserError(
            f"{place}{name!r} is a recipe, and there is a file {str(beside)!r} as well: write "
            f"{_either([beside, other])}"
        )
    return known[matches[0]]


def _either(names: Iterable[object]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _near(name: str, folder: Path, known: Iterable[str]) -> str:
    """Suggest a file or recipe with a similar name."""
    # a recipe that is written with an ending, or in other case
    stem = Path(name).stem.casefold()
    same = [key for key in known if key.partition("/")[2] == stem]
    if same and Path(name).suffix in SUFFIXES:
        return f"; a recipe has no ending: write {_either(same)}"
    if same:
        return f"; did you mean {_either(same)}?"
    # a similar name
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
    """Return the options of a configuration file.

    Raises:
        UserError: the file is no text, no valid YAML or no mapping.
    """
    return read_mapping(path)


def includes_of(path: Path) -> list[Path]:
    """Return the files that a file includes; each is relative to it, or a recipe.

    Raises:
        UserError: the file cannot be read, or an included file does not exist.
    """
    names = read(path).get("include") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path}: `include` must be a file, a recipe, or a list of these, got {names!r}"
        )
    return [find(name, path.parent, f"{path}: ") for name in names]


def warmup_of(path: Path) -> Path | None:
    """Return the stage that a file names under `warmup:`.

    The name is relative to the file, relative to the working folder, or that of a recipe.

    Returns:
        The file; None: there is no `warmup:`, or its file does not exist.

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
    """Return the argument of `-c` for a file: the name of a recipe, or a path."""
    name = name_of(path)
    if name is None:
        return str(path)
    try:
        return name if find(name).samefile(path) else os.path.abspath(path)
    except UserError:  # a file in the working folder has that name
        return os.path.abspath(path)


def with_includes(path: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """Return the files that a file includes, and theirs, and last the file itself.

    Args:
        path: the file.
        above: the files that include it, to find circles.

    Raises:
        UserError: a file is missing or is no mapping, or files include each other.
    """
    if path.name == OLD_USAGE:
        raise UserError(
            f"{path} came with an exported folder, and configurations of others are code and not "
            f"run; use lightning-mpo predict --model {path.parent} --data FILE.jsonl"
        )
    if path in above:
        raise UserError(
            f"these files `include:` each other: {', '.join(str(other) for other in above)}"
        )
    included = [
        inner for other in includes_of(path) for inner in with_includes(other, (*above, path))
    ]
    return [*included, path]


def stages_of(path: Path) -> dict[str, Path]:
    """Return the configurations that a file names under `stages:`, by the names in the file.

    Each is relative to the file, relative to the working folder, or a recipe.

    Raises:
        UserError: the file cannot be read, or a configuration does not exist.
    """
    stages = read(path).get("stages")
    stages = stages if isinstance(stages, list) else []
    entries = [entry for entry in stages if isinstance(entry, dict)]
    return {
        name: find(name, path.parent if (path.parent / name).is_file() else Path(), f"{path}: ")
        for entry in entries
        if isinstance(name := entry.get("config"), str) and name
    }


def words_of(arguments: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield each word of a command line, and whether it is the name of a configuration.

    Raises:
        UserError: `-c` is the last word.
    """
    expects_name = False  # behind a lone `-c`
    for argument in arguments:
        # `-c NAME`, `-cNAME`, `--config=NAME`
        match = re.fullmatch(r"(?:--config=|-c=?)(.+)", argument, re.S)
        if expects_name or match:
            yield (argument if expects_name or match is None else match[1]), True
            expects_name = False
        elif argument in ("-c", "--config"):
            expects_name = True
        else:
            yield argument, False
    if expects_name:
        raise UserError(
            "`-c` needs a configuration file or the name of a recipe; `lightning-mpo configs` "
            "lists them"
        )


def expand(arguments: Sequence[str]) -> list[str]:
    """Replace each `-c NAME` of a command line by its files: included ones, then the file itself.

    Raises:
        UserError: a file is missing, is no mapping or is a list of stages, or files include each
            other.
    """
    expanded: list[str] = []
    has_file = False
    for word, is_name in words_of(arguments):
        if not is_name:
            expanded.append(word)
            continue
        has_file = True
        for path in with_includes(find(word)):
            if stages := stages_of(path):
                raise UserError(
                    f"{path} is a list of stages, which `fit` runs; this command takes the "
                    f"configuration of one of them: {', '.join(map(call, stages.values()))}"
                )
            expanded += ["-c", str(path)]
            stage = warmup_of(path)
            expanded += [f"--warmup={call(stage)}"] if stage is not None else []
    # a printed configuration holds the options of all files, and includes none
    return [*expanded, "--include=null"] if has_file else expanded
