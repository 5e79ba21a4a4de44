"""The choice of the screening, `chosen.json`: the confirmation stores it first and then reads it.

A stored learning rate or comparison is never changed; cells and comparisons may be added.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparing.reading import read_json
from comparing.results import Results
from comparing.statistics import area
from comparing.studies import Comparison, StagedStudy, Task, names_of
from lightning_mpo.errors import UserError


def value_of(values: dict[str, Any], metric: str, judged: str) -> float:
    """Return the metric of an evaluation.

    Args:
        values: metrics of the evaluation, by name.
        metric: "pass_at_1" or "reward".
        judged: "whole" vocabulary or "support"; without values on a support, the former.
    """
    if metric not in values:
        names = ", ".join(sorted(values))
        raise UserError(f"the study compares {metric!r}, which a run has not; it has {names}")
    on_vocabulary = values[metric]
    value = values.get(f"support_{metric}", on_vocabulary) if judged == "support" else on_vocabulary
    return float(value)


def points_of(line: dict[str, Any], metric: str, judged: str) -> list[tuple[float, float]]:
    """Return the learning curve of a run as points (rollouts, value); the first is at 0 rollouts.

    A run over the full vocabulary has no validations on a support. Its curve is over the vocabulary,
    even if its evaluations before and after training have values on a support.
    """
    if not all(f"support_{metric}" in point for point in line["curve"]):
        judged = "whole"
    start = (0.0, value_of(line["start"], metric, judged))
    return [start] + [(p["rollouts"], value_of(p, metric, judged)) for p in line["curve"]]


def score_of(line: dict[str, Any], task: Task) -> float:
    """Return the area under the learning curve of a run."""
    return area(points_of(line, task.metric, task.judged))


def choose(study: StagedStudy, results: Results, task: str) -> dict[str, Any]:
    """Return the choice for a task: the best learning rate of each cell, and the comparisons."""
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
    """Return the comparisons of a task; the cell with the best score replaces a list of cells."""
    return [_resolve(entry, cells) for entry in study.comparisons if entry.task == task]


def _resolve(comparison: Comparison, cells: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison as in `chosen.json`; the best cell replaces a list."""

    def best(names: Sequence[str]) -> str:
        return max(names, key=lambda name: float(cells[name]["score"]))

    resolved: dict[str, Any] = asdict(comparison)
    for side in ("cell", "against"):
        resolved[side] = best(names_of(getattr(comparison, side)))
    if not isinstance(comparison.cell, str):
        resolved["best_of"] = list(comparison.cell)
    return resolved


def _is_choice(content: Any) -> bool:
    """Return whether a JSON text has the shape of `chosen.json`."""

    def has(values: Any, *keys: str) -> bool:
        return isinstance(values, dict) and values.keys() >= {*keys}

    return isinstance(content, dict) and all(
        has(choice, "cells", "comparisons")
        and isinstance(choice["cells"], dict)
        and all(has(cell, "learning_rate", "score") for cell in choice["cells"].values())
        and isinstance(choice["comparisons"], list)
        and all(has(entry, "cell", "against") for entry in choice["comparisons"])
        for choice in content.values()
    )


class Choices:
    """The content of `chosen.json`.

    Args:
        path: the file.
        tasks: by task: `cells` with learning rates and scores, and `comparisons`.
    """

    def __init__(self, path: Path, tasks: dict[str, Any]) -> None:
        self.path, self.tasks = path, tasks

    @classmethod
    def read(cls, folder: Path) -> Choices:
        """Read the file in a folder; without it there is no choice."""
        path = folder / "chosen.json"
        if not path.is_file():
            return cls(path, {})
        advice = "delete it to choose afresh"
        content = read_json(path.read_text(), str(path), advice)
        if not _is_choice(content):
            raise UserError(f"{path} does not hold a choice of a screening; {advice}")
        return cls(path, content)

    def check(self, study: StagedStudy) -> None:
        """Refuse a stored comparison of a cell that the study no longer has.

        Raises:
            UserError: the study lacks a cell.
        """
        for task in study.tasks:
            for cell in self.confirmed(task):
                if cell not in study.cells:
                    raise UserError(
                        f"{self.path}: a comparison of {cell} on {task} is stored, but the study "
                        f"has no such cell; put it back, or delete the entry of {task} to choose "
                        "afresh"
                    )

    def write(self) -> None:
        """Write the file, if there is a choice that it does not hold."""
        if not self.tasks:
            return
        text = json.dumps(self.tasks, indent=1) + "\n"
        if not self.path.is_file() or self.path.read_text() != text:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(text)
            os.replace(part, self.path)

    def add(self, task: str, choice: dict[str, Any]) -> None:
        """Add the choice for a task, or cells and comparisons to a stored one.

        Args:
            task: name of the task.
            choice: `cells` and `comparisons`.

        Raises:
            UserError: a stored cell or comparison differs.
        """
        stored = self.tasks.setdefault(task, {"cells": {}, "comparisons": []})
        for cell, content in stored["cells"].items():
            if choice["cells"].get(cell, content) != content:
                raise UserError(
                    f"{self.path}: the screening of {cell} on {task} differs from the one that its "
                    f"stored learning rate comes from; delete the entry of {task} to choose again"
                )
        changed = [entry for entry in stored["comparisons"] if entry not in choice["comparisons"]]
        if changed:
            raise UserError(
                f"{self.path}: the comparison of {changed[0]['cell']} against "
                f"{changed[0]['against']} on {task} is stored, and `confirm.comparisons` of the study "
                f"lacks it; put it back, or delete the entry of {task} to choose again"
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
