"""An objective with a reference, and the lines of a run's metrics."""

from __future__ import annotations

from tests.support.runs import Run


def lines(run: Run) -> dict[int, dict[str, float]]:
    """Return what was logged by step; validation and updates share a step."""
    merged: dict[int, dict[str, float]] = {}
    for step, line in run.record.without_clocks():
        merged.setdefault(step, {}).update(line)
    return merged
