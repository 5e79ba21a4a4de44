"""What the screening chose: stored before the confirmation, and never changed."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparing.results import Results
from comparing.statistics import area
from comparing.studies import Comparison, StagedStudy, Task, names_of
from lightning_mpo.errors import UserError


def value_of(values: dict[str, Any], metric: str, judged: str) -> float:
    """Return the metric of an evaluation, over the support if it is asked for and was truncated."""
    whole = values[metric]
    return float(values.get(f"support_{metric}", whole) if judged == "support" else whole)


def points_of(line: dict[str, Any], metric: str, judged: str) -> list[tuple[float, float]]:
    """Return the learning curve of a run: (rollouts, value), from the warm-up on.

    A run over the whole vocabulary has no curve on a support, even if its evaluations are judged
    there.
    """
    if not all(f"support_{metric}" in point for point in line["curve"]):
        judged = "whole"
    start = (0.0, value_of(line["start"], metric, judged))
    return [start] + [(p["rollouts"], value_of(p, metric, judged)) for p in line["curve"]]


def score_of(line: dict[str, Any], task: Task) -> float:
    """Return the area under the learning curve of a run."""
    return area(points_of(line, task.metric, task.judged))


def choose(study: StagedStudy, results: Results, task: str) -> dict[str, Any]:
    """Return the choice for a task: a learning rate for each cell, and the comparisons."""
    cells: dict[str, Any] = {}
    for cell in study.cells_of(task):
        lines = results.of("screen", task, cell)
        scores = {}
        for rate in study.rates_of(task):
            values = [
                score_of(line, study.tasks[task])
                for run, line in lines.items()
                if run.learning_rate == rate and run.seed in study.screen_seeds
            ]
            scores[rate] = round(statistics.mean(values), 6)
        best = max(scores, key=lambda rate: scores[rate])
        cells[cell] = {
            "learning_rate": best,
            "score": scores[best],
            "scores": {f"{rate:g}": score for rate, score in scores.items()},
        }
    return {"cells": cells, "comparisons": resolved(study, task, cells)}


def resolved(study: StagedStudy, task: str, cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the comparisons of a task, with the cell of the best score in place of each list."""
    return [_resolve(entry, cells) for entry in study.comparisons if entry.task == task]


def _resolve(comparison: Comparison, cells: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison with the best cell of each list."""

    def best(names: Sequence[str]) -> str:
        return max(names, key=lambda name: float(cells[name]["score"]))

    resolved: dict[str, Any] = asdict(comparison)
    for side in ("cell", "against"):
        resolved[side] = best(names_of(getattr(comparison, side)))
    if not isinstance(comparison.cell, str):
        resolved["best_of"] = list(comparison.cell)
    return resolved


class Choices:
    """`chosen.json`.

    Args:
        path: the file.
        tasks: by task, `cells` and `comparisons`.
    """

    def __init__(self, path: Path, tasks: dict[str, Any]) -> None:
        self.path, self.tasks = path, tasks

    @classmethod
    def read(cls, folder: Path) -> Choices:
        """Read the file of a folder."""
        path = folder / "chosen.json"
        return cls(path, json.loads(path.read_text()) if path.is_file() else {})

    def write(self) -> None:
        """Write the file, if there is a choice."""
        if not self.tasks:
            return
        text = json.dumps(self.tasks, indent=1) + "\n"
        if not self.path.is_file() or self.path.read_text() != text:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(text)
            os.replace(part, self.path)

    def take(self, task: str, choice: dict[str, Any]) -> None:
        """Take the choice for a task; cells and comparisons may be added to one that is stored.

        Raises:
            UserError: the stored choice differs.
        """
        stored = self.tasks.setdefault(task, {"cells": {}, "comparisons": []})
        for cell, content in stored["cells"].items():
            if choice["cells"].get(cell, content) != content:
                raise UserError(
                    f"{self.path}: the screening of {cell} on {task} has changed since its learning "
                    f"rate was stored; delete the entry of {task} to choose afresh"
                )
        changed = [entry for entry in stored["comparisons"] if entry not in choice["comparisons"]]
        if changed:
            raise UserError(
                f"{self.path}: the comparison of {changed[0]['cell']} against "
                f"{changed[0]['against']} on {task} is stored, but the study no longer names it; "
                f"put it back, or delete the entry of {task} to choose afresh"
            )
        stored["cells"] |= choice["cells"]
        stored["comparisons"] = choice["comparisons"]

    def learning_rate(self, task: str, cell: str) -> float:
        """Return the chosen learning rate."""
        return float(self.tasks[task]["cells"][cell]["learning_rate"])

    def comparisons(self) -> list[dict[str, Any]]:
        """Return the comparisons of all tasks."""
        return [entry for choice in self.tasks.values() for entry in choice["comparisons"]]

    def confirmed(self, task: str) -> list[str]:
        """Return the cells of a task that a comparison names."""
        entries = self.tasks.get(task, {"comparisons": []})["comparisons"]
        return list(dict.fromkeys(e[side] for e in entries for side in ("against", "cell")))
