"""Finders of citations, evidence tags and names in the files of the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "algorithms.md"
PATTERNS = {
    Path(__file__).resolve(),
    ROOT / "tests" / "project" / "test_citations.py",
    ROOT / "tests" / "project" / "test_algorithms_page.py",
}
"""Files whose text is patterns and samples of citations, not citations."""
FOLDERS = ("lightning_mpo", "callbacks", "tests", "benchmarks", "configs", "docs", "docker")
SECTION = r"\d+(?:\.\d+)?"
CITATION = re.compile(
    rf"docs/algorithms\.md\s+({SECTION}(?:(?:,| and| to)\s+{SECTION})*)"
    r"(?:,\s+invariants?\s+(\d+(?:(?:,| and)\s+\d+)*))?"
)


@cache
def files() -> list[Path]:
    """Return the texts of the repository, without what links lead to."""
    found = [ROOT / "README.md", ROOT / "RESULTS.md"]
    for folder in FOLDERS:
        inside = sorted(
            path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".yaml")
        )
        found += [path for path in inside if path not in PATTERNS and path == path.resolve()]
    return found


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def citations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each section that is cited, and the invariants of the last one of a list.

    >>> list(citations("docs/algorithms.md 3.2 to 3.4 and 16.1, invariants 4 and 6"))
    [('3.2', []), ('3.4', []), ('16.1', ['4', '6'])]
    """
    for numbers, invariants in CITATION.findall(text):
        *others, last = re.findall(SECTION, numbers)
        yield from ((number, []) for number in others)
        yield last, re.findall(r"\d+", invariants)


def sections(text: str) -> dict[str, str]:
    """Return the bodies of a page's numbered sections, those of a chapter without its subsections."""
    parts = re.split(r"^##+ ([\d.]+) .*$", text, flags=re.MULTILINE)
    return {number.rstrip("."): body for number, body in zip(parts[1::2], parts[2::2], strict=True)}
