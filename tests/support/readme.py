"""The examples of the README and of the pages for users."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
DOCS = README.parent / "docs"
RUN_PAGES = (
    *("configuration", "data", "export", "memory", "mpo", "objective", "resume", "rewards"),
    *("rlpt", "training"),
)
"""Pages whose commands name recipes, apart from the README."""
TEXTS = [README.read_text(), *((DOCS / f"{name}.md").read_text() for name in RUN_PAGES)]
BLOCKS = [block for text in TEXTS for block in re.findall(r"```python\n(.*?)```", text, re.S)]
