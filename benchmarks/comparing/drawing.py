"""Pictures of a staged study: learning curves, and paired differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from comparing.choices import Choices, points_of
from comparing.results import Results
from comparing.statistics import interval
from comparing.studies import StagedStudy
from comparing.tables import Answer, confirmed_lines


def draw_curves(study: StagedStudy, results: Results, choices: Choices, path: Path) -> None:
    """Draw the learning curves, a panel for each task: the mean over seeds, and the range of seeds."""
    pyplot = _pyplot()
    tasks = [task for task in study.tasks if choices.confirmed(task)]
    rows = max(math.ceil(len(tasks) / 3), 1)
    columns = min(max(len(tasks), 1), 3)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(6 * columns, 4.5 * rows), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(panels.flat, tasks, strict=False):
        options = study.tasks[task]
        for index, cell in enumerate(choices.confirmed(task)):
            lines = confirmed_lines(study, results, choices, task, cell).values()
            curves = [points_of(line, options.metric, options.judged) for line in lines]
            label = cell
            supported = f"support_{options.metric}"
            judged = all(supported in point for line in lines for point in line["curve"])
            if options.judged == "support" and not judged:
                label = f"{cell} (whole vocabulary)"
            if curves:
                _draw_band(axes, curves, label, f"C{index % 10}", "-" if index < 10 else "--")
        name = "pass@1" if options.metric == "pass_at_1" else "mean reward"
        place = ", as trained (support)" if options.judged == "support" else ""
        axes.set(title=task, xlabel="rollouts", ylabel=f"held-out {name}{place}")
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=7)
    _save(figure, path)


def _draw_band(axes: Any, curves: list[Any], label: str, color: str, style: str) -> None:
    """Draw the mean of curves, and the range between the lowest and the highest."""
    rollouts = [x for x, _ in curves[0]]
    values = np.array([[y for _, y in curve] for curve in curves if len(curve) == len(rollouts)])
    axes.plot(rollouts, values.mean(0), style, color=color, label=label, lw=1.5)
    if len(values) > 1:
        axes.fill_between(rollouts, values.min(0), values.max(0), color=color, alpha=0.12, lw=0)


def draw_differences(rows: list[Answer], path: Path) -> None:
    """Draw the paired differences, a row for each comparison that has runs, with 95 % intervals.

    The axis is linear up to 0.05 and logarithmic beyond.
    """
    pyplot = _pyplot()
    rows = [answer for answer in rows if answer.final or answer.area]
    figure, panels = pyplot.subplots(
        1, 2, figsize=(12, 1.4 + 0.36 * max(len(rows), 1)), layout="constrained", sharey=True
    )
    for axes, name in zip(panels, ("final", "area"), strict=True):
        for row, answer in enumerate(rows):
            values = answer.final if name == "final" else answer.area
            if not values:
                continue
            mean, half = interval(values)
            # the marker is filled where the p-value tests this outcome
            is_outcome = answer.entry["outcome"] == name
            axes.plot(values, [row] * len(values), "o", ms=3.5, color="tab:gray", alpha=0.6)
            axes.errorbar(
                mean,
                row,
                xerr=0 if math.isnan(half) else half,
                fmt="D",
                ms=5,
                capsize=3,
                color="tab:red" if answer.entry["primary"] else "tab:blue",
                markerfacecolor=None if is_outcome else "white",
            )
        axes.axvline(0, color="black", lw=0.8)
        axes.set_xscale("symlog", linthresh=0.05)
        ticks = (-0.5, -0.2, -0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.1, 0.2, 0.5)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        axes.set(xlabel=f"paired difference, {name}")
        axes.grid(alpha=0.3, axis="x")
    labels = [
        f"{a.entry['task']}: {a.entry['cell']} - {a.entry['against']}"
        + (" (support)" if a.entry["judged"] == "support" else "")
        for a in rows
    ]
    panels[0].set_yticks(range(len(rows)), labels, fontsize=8)
    panels[0].invert_yaxis()
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
