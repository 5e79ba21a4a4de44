"""The measurement in benchmarks/ra3, whose scripts stand beside each other and are no package."""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "ra3"
sys.path.insert(0, str(SCRIPTS))
import checkpoints  # noqa: E402
import expected_comments  # noqa: E402
import gain  # noqa: E402
import held_out  # noqa: E402
import lines  # noqa: E402
import records  # noqa: E402
import tables  # noqa: E402
import thoughts  # noqa: E402

sys.path.remove(str(SCRIPTS))

__all__ = [
    "checkpoints",
    "expected_comments",
    "gain",
    "held_out",
    "lines",
    "records",
    "tables",
    "thoughts",
]
