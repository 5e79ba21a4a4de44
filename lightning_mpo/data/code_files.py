"""Python files of a corpus: read from disk, checked, and cut into lines and pieces."""

from __future__ import annotations

import ast
import glob
import hashlib
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_mpo.errors import UserError

STDLIB = "stdlib"
"""Name of the standard library of the interpreter that runs, as a corpus."""
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "__pycache__")
"""Folders of the standard library that are not read: packages of others, tests, caches."""
LARGEST_FILE = 1_000_000
"""Bytes of the largest file that is read."""


@dataclass(frozen=True)
class CodeFile:
    """A Python file that parses and is indented by spaces.

    Args:
        name: path below the folder of its corpus, with `/`.
        lines: its lines, each with its line end; the last one may have none.
        starts: positions in `lines` at which a statement begins, docstrings left out.
    """

    name: str
    lines: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def text(self) -> str:
        """The whole file."""
        return "".join(self.lines)


@dataclass(frozen=True)
class Corpus:
    """The usable files of a corpus, in the order of their names, and the number of others by reason."""

    files: tuple[CodeFile, ...]
    skipped: Counter[str]


def indentation(line: str) -> str:
    """Return the white space in front of a line.

    Example:
        >>> indentation("    return 1")
        '    '
    """
    return line[: len(line) - len(line.lstrip(" \t\f"))]


def comment_above(file: CodeFile, i: int) -> str | None:
    """Return the comment line in front of a line, without its indentation and line end.

    Args:
        file: the file.
        i: position of the line.

    Returns:
        None if there is no comment, if another one is in front of it, or if it stands at another
        column than the line.
    """
    if i < 2:
        return None
    before, comment = (line.strip() for line in file.lines[i - 2 : i])
    alone = comment.startswith("#") and not before.startswith("#")
    same_column = indentation(file.lines[i - 1]) == indentation(file.lines[i])
    return comment if alone and same_column else None


def pieces_of(text: str) -> list[str]:
    """Cut code in front of each line that is not blank; blank lines stay with the line before.

    Pieces are encoded one by one, so that a thought can be put between two of them without a change
    of their tokens. Their text put together is the code.

    Example:
        >>> pieces_of("import re\\n\\n\\nx = 1\\n")
        ['import re\\n\\n\\n', 'x = 1\\n']
    """
    pieces: list[str] = []
    for line in lines_of(text):
        if pieces and not (line.strip() and pieces[-1].strip()):
            pieces[-1] += line
        else:
            pieces.append(line)
    return pieces


def lines_of(text: str) -> list[str]:
    r"""Cut a text behind each `\n`, and nowhere else: `str.splitlines` knows more line ends.

    Example:
        >>> lines_of("a\fb\nc")
        ['a\x0cb\n', 'c']
    """
    parts = text.split("\n")
    lines = [f"{part}\n" for part in parts[:-1]]
    return [*lines, parts[-1]] if parts[-1] else lines


def statement_starts(text: str) -> list[int]:
    """Return the lines (from 0) that begin with the first token of a statement.

    A comment line in front of such a line leaves the program the same. Lines inside of brackets or
    strings, continued lines, and docstrings are not among them. A decorated function begins at its
    first decorator.

    Raises:
        SyntaxError: the text is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as an unknown escape in a string
        tree = ast.parse(text)
    lines, starts = lines_of(text), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or _is_text(node):
            continue
        # a decorator stands first in its line; an offset counts bytes, white space has one each
        decorators = getattr(node, "decorator_list", None)
        number = decorators[0].lineno if decorators else node.lineno
        if decorators or not lines[number - 1][: node.col_offset].strip():
            starts.add(number - 1)
    return sorted(starts)


def _is_text(node: ast.stmt) -> bool:
    """Return whether a statement is a text alone, as docstrings are."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def read_code_file(path: Path, name: str) -> CodeFile | str:
    """Read a file; return the reason in words if it cannot be used.

    Args:
        path: the file.
        name: its name in the corpus.
    """
    data = path.read_bytes()
    if len(data) > LARGEST_FILE:
        return f"over {LARGEST_FILE // 1_000_000} MB"
    return code_file(data, name)


def code_file(data: bytes, name: str) -> CodeFile | str:
    """Make a `CodeFile` of the bytes of a file; return the reason in words if it cannot be used.

    Args:
        data: the bytes.
        name: its name in the corpus.
    """
    # text of UTF-8 with line ends of one character
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    if "\r" in text or text.startswith("\ufeff"):
        return "with carriage returns or a byte order mark"
    # statements
    try:
        starts = statement_starts(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "do not parse"
    lines = lines_of(text)
    if any("\t" in indentation(lines[i]) for i in starts):
        return "indented by tabs"
    return CodeFile(name, tuple(lines), tuple(starts))


def read_corpus(paths: Sequence[str], max_files: int | None = None) -> Corpus:
    """Read the Python files of a corpus.

    Args:
        paths: folders, whose files `*.py` are read at any depth, patterns such as `src/**/*.py`, or
            `stdlib`: the standard library of the interpreter that runs.
        max_files: most usable files, chosen by a hash of their names; None: all.

    Raises:
        UserError: a path names no Python file, or none of the files can be used.
    """
    read, skipped = read_usable(paths, max_files)
    return Corpus(tuple(file for _, file in read), skipped)


def read_usable(
    paths: Sequence[str], max_files: int | None = None
) -> tuple[list[tuple[Path, CodeFile]], Counter[str]]:
    """Return path and content of usable files by name, and the number of others by reason.

    Args:
        paths: as for `read_corpus`.
        max_files: as for `read_corpus`.

    Raises:
        UserError: a path names no Python file, or none of the files can be used.
    """
    usable: list[tuple[Path, CodeFile]] = []
    skipped = Counter[str]()
    for path, _, file in read_paths(paths, max_files):
        if isinstance(file, str):
            skipped[file] += 1
        else:
            usable.append((path, file))
    if not usable:
        raise UserError(
            f"none of {skipped.total()} Python files in {', '.join(map(repr, paths))} can be used "
            f"({describe_skipped(skipped)})"
        )
    return sorted(usable, key=lambda pair: pair[1].name), skipped


def read_paths(
    paths: Sequence[str], max_files: int | None = None
) -> list[tuple[Path, str, CodeFile | str]]:
    """Read files; return path, name, and the file or the reason in words why it cannot be used.

    Args:
        paths: as for `read_corpus`.
        max_files: most usable files, chosen by a hash of their names; None: all.

    Raises:
        UserError: a path names no Python file.
    """
    names: dict[Path, str] = {}
    for path in paths:
        for file, name in _files_of(path):
            names.setdefault(file, name)
    # a part of the files does not depend on the order of a folder
    order = sorted(names, key=lambda file: (_hash(names[file]), names[file]))
    read: list[tuple[Path, str, CodeFile | str]] = []
    usable = 0
    for file in order:
        if max_files is not None and usable >= max_files:
            break
        code = read_code_file(file, names[file])
        if not isinstance(code, str) and not code.starts:
            code = "without a statement"
        usable += not isinstance(code, str)
        read.append((file, names[file], code))
    return read


def _files_of(path: str) -> Iterator[tuple[Path, str]]:
    """Yield the files of a path and their names, in the order of their names."""
    if path == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        inside = (file for file in root.rglob("*.py"))
        files = [file for file in inside if not set(file.relative_to(root).parts) & {*LEFT_OUT}]
    elif Path(path).is_dir():
        root = Path(path)
        files = list(root.rglob("*.py"))
    else:
        fixed = path.split("*", 1)[0].rpartition("/")[0]
        root = Path(fixed or ("/" if path.startswith("/") else "."))
        files = [Path(name) for name in glob.glob(path, recursive=True)]
    files = sorted(file for file in files if file.is_file() and file.suffix == ".py")
    if not files:
        raise UserError(
            f"`paths` {path!r} names no Python file; give a folder, a pattern such as "
            f"'src/**/*.py', or '{STDLIB}'"
        )
    for file in files:
        yield file.resolve(), file.relative_to(root).as_posix()


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Describe what was left out by reason, the most frequent first.

    Example:
        >>> describe_skipped(Counter({"do not parse": 2, "not UTF-8": 1}))
        '2 do not parse, 1 not UTF-8'
    """
    return (
        ", ".join(f"{count} {reason}" for reason, count in Counter(skipped).most_common()) or "none"
    )


def share_of(text: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the text and the seed alone."""
    return _hash(f"{seed}\n{text}") / 2**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
