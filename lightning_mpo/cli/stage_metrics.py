"""The metrics of all stages in one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from lightning_mpo.storage import write_text


def write_metrics(folder: Path, names: Sequence[str]) -> None:
    """Write `metrics.csv` of a run: the rows of its stages, with `round` and `stage` in front.

    Args:
        folder: of the run.
        names: of its stages in their order, such as `round_1/e_step`. A stage without metrics is
            left out.
    """
    rows: list[dict[str, str]] = []
    columns = ["round", "stage"]
    for name in names:
        path = folder / name / "metrics.csv"
        if not path.is_file():
            continue
        number, _, stage = name.removeprefix("round_").partition("/")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns += [name for name in reader.fieldnames or () if name not in columns]
            rows += [{"round": number, "stage": stage, **row} for row in reader]
    if rows:
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / "metrics.csv", table.getvalue())
