"""Imports `benchmarks/study.py` and its parts, which are no package."""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(SCRIPTS))
import study  # noqa: E402
from comparing import (  # noqa: E402  # noqa: E402
    choices,
    drawing,
    lanes,
    plain,
    plain_drawing,
    plain_table,
    results,
    stages,
    statistics,
    studies,
    tables,
)

sys.path.remove(str(SCRIPTS))

__all__ = [
    "choices",
    "drawing",
    "lanes",
    "plain",
    "plain_drawing",
    "plain_table",
    "results",
    "stages",
    "statistics",
    "studies",
    "study",
    "tables",
]
