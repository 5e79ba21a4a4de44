"""A table of evaluations, one column for each stage of a run."""

from __future__ import annotations

from typing import Any

from lightning_mpo.rollout.evaluation import readable


def print_stages(stages: dict[str, dict[str, Any]], problems: int) -> None:
    """Print a row for each metric and a column for each stage.

    Args:
        stages: metrics by stage, such as before and after training.
        problems: held-out problems, for the title.
    """
    from rich import get_console
    from rich.table import Table

    title = f"{problems} held-out problems, 95 % intervals"
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
    digits = 4 if value < 0.1 else 3 if value < 10 else 1
    return f"{value:.{digits}f}"
