"""The analyses in benchmarks/rlpt, which are scripts beside each other and no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "rlpt"
sys.path.insert(0, str(SCRIPTS))
import coverage_picture  # noqa: E402
import execute  # noqa: E402
import problems  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "rlpt_coverage", SCRIPTS / "coverage.py"
)  # `coverage` is a package, too
coverage = importlib.util.module_from_spec(spec)
sys.modules["rlpt_coverage"] = coverage
spec.loader.exec_module(coverage)
sys.path.remove(str(SCRIPTS))

__all__ = ["coverage", "coverage_picture", "execute", "problems"]
