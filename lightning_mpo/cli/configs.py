"""`lightning-mpo configs`: list the recipes of the package, print one, or copy one to change it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_mpo.errors import UserError, exit_code_of
from lightning_mpo.recipes import (
    SUFFIXES,
    find,
    includes_of,
    name_of,
    read,
    shipped,
    stages_of,
    warmup_of,
)
from lightning_mpo.recipes.headers import FIELDS

HELP = """\
usage: lightning-mpo configs                       list the recipes
       lightning-mpo configs show NAME             print one
       lightning-mpo configs copy NAME [DEST]      copy one, to change it

  NAME   a recipe: `quickstart`, or with its folder `experiment/quickstart`
  DEST   a folder (default: configs), for the recipe and the files that it includes;
         or a file that ends in .yaml, which includes the other recipes by their names

Existing files are not changed.
"""
FOLDERS = {
    "experiment": "whole runs",
    "algorithm": "one choice for each axis of an objective",
    "model": "the policy",
    "data": "prompts and rewards",
    "hardware": "processes, precision, memory",
    "report": "evaluation before and after",
}
"""Description of each folder, in the order of the list."""
ACTIONS = ("copy", "show")


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo configs`; return the exit code."""

    def verb() -> int:
        print(answer(arguments), end="")
        return 0

    return exit_code_of(verb)


def answer(arguments: Sequence[str]) -> str:
    """Return the output of `lightning-mpo configs`; `copy` also writes files.

    Raises:
        UserError: the arguments are not as in `HELP`, there is no such recipe, or a file exists or
            cannot be written.
    """
    # the action
    if not arguments:
        return listing()
    action, *rest = arguments
    if action in ("-h", "--help"):
        return HELP
    if action not in ACTIONS:
        known = [key for key in shipped() if action in (key, key.partition("/")[2])]
        hint = f"; `lightning-mpo configs show {action}` prints the recipe" if known else ""
        raise UserError(
            f"`configs` does not take {action!r}"
            f"{hint or '; it takes copy NAME [DEST] and show NAME'}"
        )
    # its arguments
    options = [word for word in rest if word.startswith("-")]
    if options:
        raise UserError(f"`configs {action}` has no option {options[0]!r}")
    if not 1 <= len(rest) <= (2 if action == "copy" else 1):
        usage = "NAME [DEST]" if action == "copy" else "NAME"
        raise UserError(f"`configs {action}` takes {usage}: lightning-mpo configs {action} {usage}")
    # print or copy
    path = _recipe(rest[0])
    if action == "show":
        return path.read_text(encoding="utf-8")
    destination = Path(rest[1] if len(rest) > 1 else "configs")
    return (
        _copy_one(path, destination)
        if destination.suffix in SUFFIXES
        else _copy_all(path, destination)
    )


def listing() -> str:
    """Return the list of recipes by folder, each with the first sentence of its header."""
    # the recipes of each folder
    by_folder: dict[str, list[tuple[str, str]]] = {}
    for key, path in shipped().items():
        folder, _, name = key.partition("/")
        by_folder.setdefault(folder, []).append(
            (name, first_sentence(path.read_text(encoding="utf-8")))
        )
    width = max(len(name) for recipes in by_folder.values() for name, _ in recipes)
    # known folders first, in their order
    lines: list[str] = []
    for folder in [
        *(known for known in FOLDERS if known in by_folder),
        *sorted(set(by_folder) - set(FOLDERS)),
    ]:
        lines.append(f"{folder}: {FOLDERS[folder]}" if folder in FOLDERS else folder)
        lines += [_cut(f"  {name:{width}}  {first}") for name, first in by_folder[folder]]
        lines.append("")
    lines += [
        "run one:       lightning-mpo fit -c quickstart",
        "combine some:  lightning-mpo fit -c quickstart -c gspo     (later files win, key by key)",
        "change one:    lightning-mpo configs copy quickstart",
    ]
    return "\n".join(lines) + "\n"


def first_sentence(text: str) -> str:
    """Return the first sentence of a file's header.

    Example:
        >>> first_sentence("# Dr. GRPO: no deviation. More.\\n# paper: none\\nmodel: {}")
        'Dr. GRPO: no deviation.'
    """
    header: list[str] = []
    for line in text.splitlines():
        line = line.removeprefix("#").strip() if line.startswith("#") else ""
        if not line or line.partition(":")[0] in FIELDS:
            break
        header.append(line)
    text = " ".join(header)
    end = re.search(r"(?<!Dr)[.;](?= |$)", text)
    return text[: end.start()] + "." if end else text


def _cut(line: str) -> str:
    """Cut a line to the width of a terminal; in a file or a pipe it stays as it is."""
    width = shutil.get_terminal_size().columns
    return line[: width - 1] + "…" if sys.stdout.isatty() and len(line) > width else line


def _recipe(name: str) -> Path:
    """Return the path of a recipe; a file of that name in the working folder does not count."""
    known = shipped()
    matches = [key for key in known if name in (key, key.partition("/")[2])]
    if len(matches) == 1:
        return known[matches[0]]
    path = find(name)
    if name_of(path) is None:
        raise UserError(
            f"{name!r} is a file, not a recipe; `lightning-mpo configs` lists the recipes"
        )
    return path


def _copy_all(path: Path, destination: Path) -> str:
    """Write a recipe and its includes into a folder, with the subfolders that they have here."""
    targets = {
        source: destination / source.parent.name / source.name for source in _with_needed(path)
    }
    target = targets[path]
    if destination.exists() and not destination.is_dir():
        raise UserError(
            f"{str(destination)!r} is a file; give a folder, or a new file that ends in .yaml"
        )
    if target.exists() and target.read_bytes() != path.read_bytes():
        raise UserError(f"{target} exists and differs from the recipe; give another folder")
    # write the files that are missing
    lines: list[str] = []
    for source, copy in targets.items():
        if copy.exists():
            same = copy.read_bytes() == source.read_bytes()
            lines.append(
                f"kept       {copy}, {'the same' if same else 'which differs from the recipe'}"
            )
            continue
        _write(copy, source.read_text(encoding="utf-8"))
        lines.append(f"written    {copy}")
    return "\n".join([*lines, _how(path, target)]) + "\n"


def _with_needed(path: Path) -> list[Path]:
    """Return a recipe, all files that it includes and its stages, each once."""
    paths: list[Path] = []
    waiting = [path]
    while waiting:
        source = waiting.pop(0)
        if source in paths:
            continue
        paths.append(source)
        stage = warmup_of(source)
        waiting += [*includes_of(source), *([stage] if stage is not None else [])]
        waiting += stages_of(source).values()
    return paths


def _copy_one(path: Path, target: Path) -> str:
    """Write a recipe as one file, which includes the others by their names."""
    if target.exists():
        raise UserError(f"{target} exists; give another file")
    # the names by which the file refers to other recipes, and the names of these
    content = read(path)
    entries = content.get("include") or []
    entries = [entries] if isinstance(entries, str) else entries
    pairs = [(word, name_of(other)) for word, other in zip(entries, includes_of(path), strict=True)]
    stage = warmup_of(path)
    pairs += [(content["warmup"], name_of(stage))] if stage is not None else []
    pairs += [(word, name_of(other)) for word, other in stages_of(path).items()]
    # replace them, except in comments
    lines = path.read_text(encoding="utf-8").splitlines()
    for word, name in pairs:
        pattern = rf"(^|[\s\[,:-]){re.escape(word)}(?=[\s\],}}]|$)"
        lines = [
            line if line.startswith("#") else re.sub(pattern, rf"\g<1>{name}", line)
            for line in lines
        ]
    _write(target, "\n".join(lines) + "\n")
    return f"written    {target}\n{_how(path, target)}\n"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:  # "x": an existing file is never replaced
            file.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {os.strerror(error.errno or 0)}") from error


def _how(source: Path, target: Path) -> str:
    """Return the line that says how to run a copied recipe."""
    below = "" if source.parent.name == "experiment" else "-c quickstart "
    return f"run it     lightning-mpo fit {below}-c {target}"
