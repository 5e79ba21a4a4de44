"""The table and the picture of coverage.py, also from the tables of several runs.

    python benchmarks/rlpt/coverage_picture.py runs/rlpt/gsm8k/coverage.csv runs/rlpt/svamp/coverage.csv --out runs/rlpt

Prints the table, and writes `coverage.png`. The runs must be of one model and have no data set in
common.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mpo.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "mpo"))
from common import Row, panels, print_table, run, save_picture

POSITIONS = {
    "all": (1, math.inf),
    "1": (1, 1),
    "2-8": (2, 8),
    "9-32": (9, 32),
    "33+": (33, math.inf),
}
SOURCES = ("reference", "own correct")
NUMBERS = {"K": int, "tokens": int, "problems": int, "coverage": float, "low": float, "high": float}


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("tables", nargs="+", help="files that coverage.py wrote")
    made.add_argument("--out", default="runs/rlpt", help="folder of the picture")
    arguments = made.parse_args(argv)
    tables = [read(path) for path in arguments.tables]
    rows = [row for table in tables for row in table]
    if len({row["model"] for row in rows}) > 1:
        raise UserError(
            f"the tables are of several models: {', '.join(sorted({row['model'] for row in rows}))}"
        )
    domains = [
        domain for table in tables for domain in dict.fromkeys(row["domain"] for row in table)
    ]
    if len(set(domains)) < len(domains):
        raise UserError(f"two of the tables hold the same data set: {', '.join(domains)}")
    print_table(summary(rows))
    draw(rows, arguments.out)


def read(path: str) -> list[Row]:
    """Read a table of coverage.py."""
    try:
        with open(path, newline="") as file:
            return [
                row | {name: kind(row[name]) for name, kind in NUMBERS.items()}
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"cannot read {path} as a table of coverage.py: {type(error).__name__}: {error}"
        ) from error


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return a line per domain, source and position with K as columns, in percent."""
    lines: dict[tuple[str, str, str], dict[str, str | int]] = {}
    for row in rows:
        key = {name: row[name] for name in ("domain", "source", "position")}
        counts = {name: row[name] for name in ("problems", "tokens")}
        line = lines.setdefault(tuple(key.values()), key | counts)  # type: ignore[arg-type]
        spread = (
            "" if math.isnan(row["low"]) else f" ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
        )
        line[f"top {row['K']}"] = f"{100 * row['coverage']:.2f}{spread}"
    return list(lines.values())


def draw(rows: Sequence[Row], folder: str) -> None:
    """Plot coverage over K: a line of panels per source, first all domains, then each domain by position."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    sources = [source for source in SOURCES if any(row["source"] == source for row in rows)]
    figure, axes = panels(len(sources), 1 + len(domains), width=3.6, height=3.3, share_rows=True)
    for line, source in zip(axes, sources, strict=True):
        for i, domain in enumerate(domains):
            curve(line[0], rows, (domain, source, "all"), domain, f"C{i}")
        line[0].set(title=f"{source}: all positions", ylabel="share of tokens in the top K")
        for one, domain in zip(line[1:], domains, strict=True):
            for i, position in enumerate(POSITIONS):
                if position != "all":
                    curve(one, rows, (domain, source, position), f"token {position}", f"C{i + 2}")
            one.set_title(f"{source}: {domain}")
        for one in line:
            one.set_xscale("log", base=2)
            one.set(xlabel="K", ylim=(None, 1.01))
            if one.lines:
                one.legend(fontsize=8, loc="lower right")
            else:
                one.text(0.5, 0.5, "no correct completion", ha="center", transform=one.transAxes)
    save_picture(figure, folder, "coverage")


def curve(
    one: Any, rows: Sequence[Row], which: tuple[str, str, str], label: str, colour: str
) -> None:
    """Draw the line of a domain, source and position with its intervals, if there are tokens."""
    line = [row for row in rows if (row["domain"], row["source"], row["position"]) == which]
    if line:
        x, y = [row["K"] for row in line], [row["coverage"] for row in line]
        off = [
            [row["coverage"] - row["low"] for row in line],
            [row["high"] - row["coverage"] for row in line],
        ]
        one.errorbar(x, y, yerr=off, fmt="o-", ms=3, capsize=2, label=label, color=colour)


if __name__ == "__main__":
    run(main)
