"""Thoughts written into the files of a corpus, and taken out again byte for byte.

A thought is a comment line in front of a line of code. Nothing in its text says that a model wrote it,
so a model that learns from the files learns plain comments. The file `thoughts.json` beside them lists
which lines are thoughts. `strip` removes these lines alone, and refuses files that have changed since.
"""

from __future__ import annotations

import ast
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mpo.data.code_files import (
    CodeFile,
    describe_skipped,
    indentation,
    lines_of,
    read_paths,
    read_usable,
)
from lightning_mpo.errors import UserError

SIDE_FILE = "thoughts.json"
"""Lines that are thoughts, by file."""


@dataclass(frozen=True)
class Annotated:
    """What was written or restored.

    Args:
        files: number of files.
        thoughts: number of thoughts.
        skipped: files that were copied as they are, by reason.
    """

    files: int
    thoughts: int
    skipped: str = "none"


def with_thoughts(file: CodeFile, thoughts: Mapping[int, str]) -> tuple[str, list[int]]:
    """Return a file with comment lines, and the positions of these lines in it, from 0.

    Args:
        file: the file.
        thoughts: text of each comment, with its `#`, by the position in `file.lines` of the line that
            it stands in front of.

    Raises:
        ValueError: a position begins no statement, or a text is not one comment line.
    """
    lines: list[str] = []
    added: list[int] = []
    for i, line in enumerate(file.lines):
        if i in thoughts:
            text = thoughts[i]
            if i not in file.starts or not text.startswith("#") or len(lines_of(text)) != 1:
                raise ValueError(f"no comment line in front of a statement: {text!r}, line {i}")
            added.append(len(lines))
            lines.append(f"{indentation(line)}{text}\n")
        lines.append(line)
    return "".join(lines), added


def without_lines(text: str, added: list[int]) -> str:
    """Return a text without the lines at some positions, counted from 0.

    Example:
        >>> without_lines("a\\n# b\\nc", [1])
        'a\\nc'
    """
    left_out = set(added)
    return "".join(line for i, line in enumerate(lines_of(text)) if i not in left_out)


def annotate_folder(
    paths: list[str],
    to: Path,
    think: Callable[[CodeFile], Mapping[int, str]],
    max_files: int | None = None,
) -> Annotated:
    """Write the files of a corpus with thoughts into a new folder.

    Files that cannot be read as code are copied as they are.

    Args:
        paths: as for `CodeLines`.
        to: a folder that does not exist, or is empty.
        think: returns the thoughts of a file, as for `with_thoughts`.
        max_files: most files, chosen by a hash of their names; None: all.

    Raises:
        UserError: the folder is not empty, two files have one name, or a file would be another
            program with its thoughts.
    """
    check_empty(to)
    read = read_paths(paths, max_files)
    names = [name for _, name, _ in read]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"two files of the corpus are called {twice!r}; annotate one folder at a time"
        )
    listed: dict[str, Any] = {}
    skipped: dict[str, int] = {}
    thoughts = 0
    for path, name, file in read:
        data, added = path.read_bytes(), list[int]()
        if isinstance(file, str):
            skipped[file] = skipped.get(file, 0) + 1
        else:
            text, added = with_thoughts(file, think(file))
            _check_same_program(file, text)
            data = text.encode("utf-8")
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        listed[name] = {"lines": added, "sha256": hashlib.sha256(data).hexdigest()}
        thoughts += len(added)
    (to / SIDE_FILE).write_text(json.dumps({"version": 1, "files": listed}, indent=1) + "\n")
    return Annotated(len(read), thoughts, describe_skipped(skipped))


def strip_folder(folder: Path, to: Path) -> Annotated:
    """Write the files of an annotated folder without their thoughts into a new folder.

    Args:
        folder: as `annotate_folder` wrote it.
        to: a folder that does not exist, or is empty.

    Raises:
        UserError: the folder has no list of thoughts, or a file has changed since it was written.
    """
    listed = read_side_file(folder)
    check_empty(to)
    # all files are checked before one is written
    data = {name: _unchanged(folder, name, entry["sha256"]) for name, entry in listed.items()}
    thoughts = 0
    for name, entry in listed.items():
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        restored = data[name]
        if entry["lines"]:
            restored = without_lines(restored.decode("utf-8"), entry["lines"]).encode("utf-8")
        target.write_bytes(restored)
        thoughts += len(entry["lines"])
    return Annotated(len(listed), thoughts)


@dataclass(frozen=True)
class AnnotatedFile:
    """A file without its thoughts, and the thoughts.

    Args:
        name: path below the folder of its corpus.
        text: the file without thoughts.
        thoughts: text of each thought, with its `#`, by the position in `text` of the line behind
            it, counted from 0.
    """

    name: str
    text: str
    thoughts: dict[int, str]


@dataclass(frozen=True)
class AnnotatedCorpus:
    """Usable files in the order of their names, and the number of others by reason."""

    files: list[AnnotatedFile]
    skipped: Counter[str]


def read_without_thoughts(paths: Sequence[str], max_files: int | None = None) -> AnnotatedCorpus:
    """Read files, and take thoughts out of those in a folder that `annotate` wrote.

    Args:
        paths: as for `CodeLines`.
        max_files: most usable files, chosen by a hash of their names; None: all.

    Raises:
        UserError: there is no usable file, or an annotated one has changed since.
    """
    read, skipped = read_usable(paths, max_files)
    files: list[AnnotatedFile] = []
    folders: dict[Path, dict[str, Any]] = {}
    for path, file in read:
        added = _added_lines(path, folders)
        at = set(added)
        plain = [line for i, line in enumerate(file.lines) if i not in at]
        # the line behind a thought, where no thought is counted
        thoughts = {i - n: file.lines[i].strip() for n, i in enumerate(added)}
        files.append(AnnotatedFile(file.name, "".join(plain), thoughts))
    return AnnotatedCorpus(files, skipped)


def _added_lines(path: Path, folders: dict[Path, dict[str, Any]]) -> list[int]:
    """Return the positions of thoughts in a file, ascending; none outside of annotated folders.

    Args:
        path: of the file.
        folders: entries of the side files that were read; a folder without one has none.
    """
    for folder in path.parents:
        if folder not in folders:
            folders[folder] = read_side_file(folder) if (folder / SIDE_FILE).is_file() else {}
        entry = folders[folder].get(path.relative_to(folder).as_posix())
        if entry is not None:
            _unchanged(folder, path.relative_to(folder).as_posix(), entry["sha256"])
            return sorted(entry["lines"])
    return []


def read_side_file(folder: Path) -> dict[str, Any]:
    """Return lines and digest of each annotated file, by name.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    path = folder / SIDE_FILE
    if not path.is_file():
        raise UserError(f"{str(folder)!r} has no {SIDE_FILE}; give a folder that `annotate` wrote")
    try:
        files = json.loads(path.read_text())["files"]
        for name, entry in files.items():
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            if not inside or not all(isinstance(i, int) for i in entry["lines"]):
                raise ValueError(name)
            str(entry["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error}); annotate the files again") from error
    return dict(files)


def check_empty(to: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        UserError: it does.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{str(to)!r} is there and not an empty folder; give another one")


def _unchanged(folder: Path, name: str, digest: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{str(path)!r} is missing, which {SIDE_FILE} lists; annotate again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(
            f"{str(path)!r} has changed since it was annotated, so its thoughts cannot be told "
            "from its other lines; restore it, or annotate the files again"
        )
    return data


def _check_same_program(file: CodeFile, text: str) -> None:
    """Refuse thoughts that change a program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = ast.dump(ast.parse(text)) == ast.dump(ast.parse(file.text))
    if not same:
        raise UserError(f"{file.name!r} would be another program with its thoughts")
