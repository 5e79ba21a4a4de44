"""Counts the alarms that the watchdog would give, from the `metrics.csv` of finished runs.

    python benchmarks/watchdog_alarms.py FOLDER...        # every metrics.csv below the folders

A run is healthy by its figures alone. Held-out pass@1 ends within 0.03 of its best, not more than
0.01 below its start, and never falls by more than 0.1 between. The training reward ends at or above
its start, and no mean of three rollouts is more than 0.2 below an earlier one. At no time are half
of the responses of three rollouts cut off.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from lightning_mpo.metrics.alarms import WatchdogLimits, alarms
from lightning_mpo.metrics.trends import Trends

HELD_OUT = "val/pass_at_1"


@dataclass
class Replay:
    """A run as its `metrics.csv` tells it."""

    rollouts: list[dict[str, float]] = field(default_factory=list)
    evaluations: dict[int, float] = field(default_factory=dict)
    """pass@1 by the number of rollouts before it."""

    @classmethod
    def read(cls, path: Path) -> Replay:
        """Read a file; the last row of a rollout counts."""
        run = cls()
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                figures = {name: float(text) for name, text in row.items() if text}
                if "rollout/counter" in figures:
                    last = run.rollouts[-1]["rollout/counter"] if run.rollouts else None
                    run.rollouts[
                        -1 if last == figures["rollout/counter"] else len(run.rollouts) :
                    ] = [figures]
                if HELD_OUT in figures:
                    run.evaluations[len(run.rollouts)] = figures[HELD_OUT]
        return run

    @property
    def healthy(self) -> bool:
        """Whether its figures are those of a healthy run; the module's docstring has the rule."""
        held_out = list(self.evaluations.values())
        means, cut_off = self.means("reward/mean"), self.means("rollout/truncated")
        return (
            bool(held_out)
            and bool(means)
            and held_out[-1] >= max(max(held_out) - 0.03, held_out[0] - 0.01)
            and deepest_fall(held_out) <= 0.1
            and means[-1] >= means[0]
            and deepest_fall(means) <= 0.2
            and max(cut_off) < 0.5
        )

    def means(self, name: str) -> list[float]:
        """Return the mean of a metric over each three rollouts in a row."""
        values = [row[name] for row in self.rollouts]
        return [fmean(values[i : i + 3]) for i in range(len(values) - 2)]

    def alarms(self, limits: WatchdogLimits) -> dict[str, tuple[int, str]]:
        """Return rollout and sentence of each alarm, by cause."""
        trends, found = Trends(limits.window, limits.hacking or 0.0), {}
        for i, figures in enumerate(self.rollouts, 1):
            trends.add(figures, ["reward/accuracy"])
            if i in self.evaluations:
                trends.compare(HELD_OUT, self.evaluations[i])
            for cause, sentence in alarms(trends, limits).items():
                found.setdefault(cause, (i, sentence))
        return found


def deepest_fall(values: list[float]) -> float:
    """Return the largest difference between a value and a later one."""
    return max(max(values[: i + 1]) - value for i, value in enumerate(values))


def main() -> None:
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for folder in sys.argv[1:]:
        for path in sorted(Path(folder).rglob("metrics.csv")):
            if "reward/mean" not in path.open().readline():
                continue
            run = Replay.read(path)
            found = run.alarms(WatchdogLimits())
            counts[run.healthy].update(["runs", *(["with an alarm"] if found else []), *found])
            for cause, (rollout, sentence) in found.items():
                kind = "healthy  " if run.healthy else "unhealthy"
                print(f"{kind} {path.parent} rollout {rollout}: {cause}: {sentence}")
    for healthy, counter in counts.items():
        print("healthy:" if healthy else "unhealthy:", dict(counter))


if __name__ == "__main__":
    main()
