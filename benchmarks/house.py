"""Measures the structure of the package: sizes, comments, wide lines, circles of imports.

    python benchmarks/house.py ROOT        # exits 1 where a bound is exceeded; without ROOT: this checkout

The files of `lightning_mpo/` and `callbacks/` are counted. Imports under `TYPE_CHECKING` and within
functions count, as readers of a file read them too.
"""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

WIDTH, LONG_FILE, LONG_FUNCTION, MANY_ARGUMENTS, LONG_BODY = 100, 300, 60, 8, 20
BOUNDS = {
    "files over 300 lines": 0,
    "functions over 60 lines": 0,
    "functions with more than 8 arguments": 6,
    "code lines over 100 columns": 0,
    "circles of files": 0,
    "type: ignore": 45,
}
LEAST = {"comments per 100 code lines, in bodies over 20 lines": 5.0}


@dataclass
class Figures:
    """Counts, and the places behind them."""

    values: dict[str, float] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def count(self, name: str, places: list[str]) -> None:
        """Enter a count with its places."""
        self.values[name], self.places[name] = len(places), places


def source_files(root: Path) -> list[Path]:
    """Return the files of package and callbacks, each once."""
    return sorted(
        path
        for folder in ("lightning_mpo", "callbacks")
        for path in (root / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    )


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_start(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the first line behind the docstring."""
    body = function.body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    if documented and len(body) > 1:
        return body[1].lineno
    return (body[0].end_lineno or 0) + 1 if documented else body[0].lineno


def comment_lines(path: Path) -> set[int]:
    """Return the lines with a comment that explains: pragmas for tools do not count."""
    with path.open("rb") as file:
        tokens = [
            token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT
        ]
    return {
        token.start[0]
        for token in tokens
        if not re.match(r"# *(noqa|type:|fmt:|pragma|---)", token.string)
    }


def string_lines(tree: ast.AST) -> set[int]:
    """Return the lines of docstrings and of other bare strings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def imported(path: Path, root: Path, files: set[Path]) -> set[Path]:
    """Return the files of the package that a file imports anywhere."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {target for name in names if (target := file_of(name, root, files)) is not None}
    return found - {path}


def file_of(name: str, root: Path, files: set[Path]) -> Path | None:
    """Return the file of a module; a package without code of its own is none."""
    place = root / name.replace("lightning_mpo.callbacks", "callbacks").replace(".", "/")
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path in files:
            return path
    return None


def circles(graph: dict[Path, set[Path]]) -> list[list[Path]]:
    """Return the strongly connected components of more than one file (Tarjan)."""
    index: dict[Path, int] = {}
    low: dict[Path, int] = {}
    stack: list[Path] = []
    found: list[list[Path]] = []

    def visit(node: Path) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if (
            low[node] == index[node]
        ):  # the root of a component: all above it on the stack belong to it
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def measure(root: Path) -> Figures:
    """Return all figures of a checkout."""
    figures, files = Figures(), source_files(root)
    long_files, long_functions, wide, ignores, arguments = [], [], [], [], []
    body_lines = body_comments = 0
    for path in files:
        text, place = path.read_text(), str(path.relative_to(root))
        lines, tree = text.splitlines(), ast.parse(text)
        strings, comments = string_lines(tree), comment_lines(path)
        if len(lines) > LONG_FILE:
            long_files.append(f"{place} ({len(lines)})")
        wide += [
            f"{place}:{i}"
            for i, line in enumerate(lines, 1)
            if len(line) > WIDTH and i not in strings
        ]
        ignores += [f"{place}:{i}" for i, line in enumerate(lines, 1) if "# type: ignore" in line]
        for function in functions(tree):
            end, start = function.end_lineno or 0, body_start(function)
            where = f"{place}:{function.lineno} {function.name}"
            if end - function.lineno + 1 > LONG_FUNCTION:
                long_functions.append(f"{where} ({end - function.lineno + 1})")
            names = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            if len([name for name in names if name.arg not in ("self", "cls")]) > MANY_ARGUMENTS:
                arguments.append(where)
            if end - start + 1 > LONG_BODY:
                body = [
                    i for i in range(start, end + 1) if lines[i - 1].strip() and i not in strings
                ]
                body_lines += len(body)
                body_comments += len(comments & set(body))
    graph = {path: imported(path, root, set(files)) for path in files if path.name != "__init__.py"}
    graph = {path: {other for other in others if other in graph} for path, others in graph.items()}
    figures.count("files over 300 lines", long_files)
    figures.count("functions over 60 lines", long_functions)
    figures.count("functions with more than 8 arguments", arguments)
    figures.count("code lines over 100 columns", wide)
    figures.count(
        "circles of files",
        [" - ".join(str(f.relative_to(root)) for f in c) for c in circles(graph)],
    )
    figures.count("type: ignore", ignores)
    share = 100 * body_comments / max(body_lines, 1)
    figures.values["comments per 100 code lines, in bodies over 20 lines"] = round(share, 1)
    figures.values["files"] = len(files)
    figures.values["lines"] = sum(len(path.read_text().splitlines()) for path in files)
    return figures


def main(arguments: list[str]) -> int:
    """Print the figures, and the places of those that exceed a bound."""
    figures, missed = (
        measure(Path(arguments[0] if arguments else Path(__file__).parents[1]).resolve()),
        0,
    )
    for name, value in figures.values.items():
        bound = BOUNDS.get(name, LEAST.get(name))
        bad = bound is not None and (value > bound if name in BOUNDS else value < bound)
        missed += bad
        print(
            f"{value:>8g}  {name}"
            + ("" if bound is None else f" (bound {bound:g}{', missed' if bad else ''})")
        )
        if bad:
            print(
                "".join(f"          {place}\n" for place in figures.places.get(name, [])[:60]),
                end="",
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
