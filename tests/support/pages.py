"""The pages of docs/, their tables and their code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

FROM_TRL = ROOT / "docs" / "from_trl.md"


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


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
