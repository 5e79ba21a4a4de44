"""A table of evaluations, one column for each stage of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_mpo.metrics import paired
from lightning_mpo.rollout.evaluation import (
    Problem,
    by_group,
    gathered,
    readable,
    results_of,
    with_intervals,
)


def print_stages(stages: dict[str, dict[str, Any]], title: str) -> None:
    """Print a row for each metric and a column for each stage.

    Args:
        stages: metrics by stage, such as before and after training.
        title: line above the table.
    """
    from rich import get_console
    from rich.table import Table

    table = Table("", *stages, title=title, title_justify="left")
    # every metric of any stage, in order; intervals stand beside their value
    names = [name for stage in stages.values() for name in stage if not name.endswith("interval")]
    for name in dict.fromkeys(names):
        cells = []
        for stage in stages.values():
            interval = stage.get(f"{name}_interval")
            bounds = f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
            cells.append(_shown(stage.get(name)) + bounds)
        table.add_row(readable(name), *cells)
    # the console of the progress bar: the table is printed above it
    get_console().print(table)


def _shown(value: float | None) -> str:
    """Return a number with about four digits; empty: the stage has no such metric."""
    if value is None:
        return ""
    digits = 4 if abs(value) < 0.1 else 3 if abs(value) < 10 else 1
    return f"{value:.{digits}f}"


def print_groups(
    problems: Sequence[Problem], ks: Sequence[int], columns: Sequence[str] | None, name: str
) -> None:
    """Print a table for each column that names a level or a type: a table column for each value.

    Args:
        problems: as `problem_results` returns them.
        ks: of pass@k.
        columns: as for `by_group`.
        name: of the benchmark, for the titles.
    """
    for column, by_value in by_group(problems, columns).items():
        stages = {
            f"{value} ({len(part)})": with_intervals(results_of(part, ks))
            for value, part in by_value.items()
        }
        print_stages(stages, f"{name} by {column} (problems)")


def print_difference(
    name: str, problems: Sequence[Problem], others: Sequence[Problem], ks: Sequence[int]
) -> dict[str, list[float]]:
    """Print both evaluations of the same problems, and their paired difference; return it.

    Args:
        name: of the benchmark.
        problems: results of one evaluation.
        others: those of the earlier one, which is subtracted.
        ks: of pass@k.
    """
    first, second = gathered(others, ks), gathered(problems, ks)
    change = paired(first, second)
    stages = {
        "before": with_intervals(first.results()),
        "after": with_intervals(second.results()),
        "difference": with_intervals(change),
    }
    print_stages(stages, f"{name}, {len(problems)} problems, paired, 95 % intervals")
    return change
