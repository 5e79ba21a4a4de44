"""`lightning-mpo methods`: a table of the algorithm files, made from their choices and headers."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_mpo import recipes
from lightning_mpo.errors import UserError, exit_code_of
from lightning_mpo.recipes.headers import FIELDS, TAGS, Method, is_number, read, tags, word

FOLDER = recipes.FOLDER / "algorithm"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
COLUMNS = (
    "method, and its paper",
    "choices",
    "values, and where they come from",
    "confidence in the equations",
)
NEARLY_ALL = 0.8
"""Share of files. A choice of at least that many stands once under the table, not in each row."""
MANY = 5
"""Least number of files for which common choices stand under the table."""


def read_folder(folder: Path) -> list[Method]:
    """Read every algorithm file of a folder, in the order of their names.

    Raises:
        UserError: there is no such folder, it holds no YAML file, or a file or its header is wrong.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}; give `--configs` a folder of algorithm files")
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise UserError(
            f"{str(folder)!r} holds no .yaml file; give `--configs` a folder of algorithm files"
        )
    return [read(path) for path in paths]


def table(methods: Sequence[Method], page: Path | None = None) -> str:
    """Return the methods as a Markdown table; a note below explains common choices and tags.

    Args:
        methods: the rows.
        page: the file for the table; links are relative to it. None: to the root of the repository.
    """
    rows = [COLUMNS, ("---",) * len(COLUMNS), *_rows(methods, page)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", _note(methods)]) + "\n"


def _rows(methods: Sequence[Method], page: Path | None = None) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each row."""
    common = _common_choices(methods)
    for method in methods:
        # choices that differ from the common ones; each loss term is a choice
        choices = [
            _choice(axis, item)
            for axis, value in method.choices.items()
            for item in (value if isinstance(value, list) else [value])
            if value != common.get(axis)
        ]
        paper = re.sub(
            r"arXiv:(\d{4}\.\d{4,5})",
            r"[arXiv:\1](https://arxiv.org/abs/\1)",
            method.header["paper"],
        )
        yield (
            f"[{method.path.stem}]({_link(method.path, page)}): {paper}",
            ", ".join(f"`{choice}`" for choice in choices),
            method.header["values"],
            method.header["confidence"],
        )


def _link(path: Path, page: Path | None) -> str:
    """Return the link to a file; a link to a recipe leads into the repository."""
    if not path.is_relative_to(recipes.FOLDER):
        return path.as_posix()
    root, inside = (
        recipes.FOLDER.resolve().parent,
        Path("configs") / path.relative_to(recipes.FOLDER),
    )
    if page is None or not page.resolve().is_relative_to(root):
        return inside.as_posix()
    return Path(os.path.relpath(root / inside, page.resolve().parent)).as_posix()


def _note(methods: Sequence[Method]) -> str:
    """Return the note below the table."""
    defaults = [
        f"no {axis}" if value in (None, []) else f"{axis} `{_choice(axis, value)}`"
        for axis, value in _common_choices(methods).items()
    ]
    note = f"Where a row says nothing else: {', '.join(defaults)}. " if defaults else ""
    used = {tag for method in methods for key in FIELDS for tag in tags(method.header[key])}
    meanings = "; ".join(f"[{tag}] {meaning}" for tag, meaning in TAGS.items() if tag in used)
    return f"{note}Switches that are off are left out. {meanings}."


def _common_choices(methods: Sequence[Method]) -> dict[str, Any]:
    """Return the common choice by axis: none if a file leaves it empty, else that of most files."""
    common: dict[str, Any] = {}
    for axis in dict.fromkeys(axis for method in methods for axis in method.choices):
        choices = [method.choices.get(axis) for method in methods]
        most_frequent = max(choices, key=choices.count)
        is_common = choices.count(most_frequent) >= NEARLY_ALL * len(methods)
        empty = [value for value in choices if value in (None, [])]
        if empty:
            common[axis] = empty[0]
        elif len(methods) >= MANY and is_common:
            common[axis] = most_frequent
    return common


def _choice(axis: str, value: Any) -> str:
    """Write a choice as in `ClippedRatio(0.2, 0.28)`; without a class, it has the name of its axis.

    Numbers in front and plain words have no name; `null` and switches that are off are left out.

    >>> _choice("weights", {"coef": 0.1, "clip": None})
    'weights(0.1)'
    >>> arguments = {"length": 3, "source": "mtp", "stride": 1, "mean": True}
    >>> _choice("actions", {"class_path": "Blocks", "init_args": arguments})
    'Blocks(3, mtp, stride 1, mean)'
    """
    if not isinstance(value, dict):
        return word(value)
    is_class = "class_path" in value
    name = value["class_path"].rsplit(".", 1)[-1] if is_class else axis
    arguments: list[str] = []
    leading_numbers = True
    for key, argument in ((value.get("init_args") or {}) if is_class else value).items():
        leading_numbers = leading_numbers and is_number(argument)
        if isinstance(argument, bool):
            arguments += [key] if argument else []
        elif argument is not None:
            # numbers in front and plain words need no name; a mapping has that of its key already
            is_word = isinstance(argument, str) and not argument.startswith("${")
            is_mapping = isinstance(argument, dict) and "class_path" not in argument
            text = _choice(key, argument)
            bare = leading_numbers or is_word or is_mapping
            arguments.append(text if bare else f"{key} {text}")
    return f"{name}({', '.join(arguments)})" if arguments else name


def refresh(page: Path, text: str) -> None:
    """Put the table between the markers of a Markdown file.

    Raises:
        UserError: the file is missing or lacks the markers.
    """
    if not page.is_file():
        raise UserError(f"`--page`: no file {str(page)!r}")
    try:
        before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{page} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from error
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(
            f"{page} must hold the lines `{BEGIN}` and `{END}`; the table goes between them"
        )
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo methods`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="lightning-mpo methods",
        description="Print a folder of algorithm files as a table: the choices of each, and their "
        "sources.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--configs", type=Path, default=FOLDER, metavar="DIR", help="default: those of the package"
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help=f"write the table between `{BEGIN}` and `{END}` of this file instead",
    )
    return exit_code_of(lambda: _run(*parser.parse_known_args(arguments)))


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(
            f"`methods` does not take {rest[0]!r}; it takes --configs DIR and --page FILE"
        )
    methods = read_folder(options.configs)
    if options.page is not None:
        refresh(options.page, table(methods, options.page))
    elif sys.stdout.isatty():
        _show(methods)
    else:
        print(table(methods), end="")
    return 0


def _show(methods: Sequence[Method]) -> None:
    """Print the table at the width of the terminal; lines of Markdown would be too long for it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 1, 0))
    for name in COLUMNS:
        shown.add_column(name, overflow="fold")
    for row in _rows(methods):
        shown.add_row(*(Text(re.sub(r"`|\]\([^)]*\)|\[(?=[^\]]*\]\()", "", cell)) for cell in row))
    console = Console()
    console.print(shown)
    console.print(Text(_note(methods).replace("`", "")))
