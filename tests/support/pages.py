"""The pages of docs/, their tables and their code."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the tables below a heading, without the first row of each."""
    section = page.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [
        line.strip().strip("|").split(" | ")
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return [[cell.strip() for cell in cells] for cells in lines if not cells[0].startswith("---")][
        1:
    ]
