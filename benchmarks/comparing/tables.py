"""The tables of a staged study, as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from comparing.choices import Choices, points_of, value_of
from comparing.results import Results, Run
from comparing.statistics import area, detectable, first_reach, holm, interval, p_value
from comparing.studies import StagedStudy, Task

Line = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A comparison with its paired differences, one for each seed.

    Args:
        entry: the comparison, as in `chosen.json`.
        final: differences in the metric after training.
        area: differences in the area under the curve of the metric.
    """

    entry: dict[str, Any]
    final: list[float]
    area: list[float]

    @property
    def outcome(self) -> list[float]:
        """The differences that the p-value tests."""
        return self.area if self.entry["outcome"] == "area" else self.final


def answers(study: StagedStudy, results: Results, choices: Choices) -> list[Answer]:
    """Return all comparisons, with differences for the seeds that both cells have."""
    rows = []
    for entry in choices.comparisons():
        if entry["task"] not in study.tasks:
            continue
        task = study.tasks[entry["task"]]
        judged = entry["judged"] or task.judged
        ours, theirs = (
            confirmed_lines(study, results, choices, entry["task"], entry[side])
            for side in ("cell", "against")
        )
        seeds = sorted(ours.keys() & theirs.keys())
        pairs = [(ours[seed], theirs[seed]) for seed in seeds]
        final = [_final(a, task, judged) - _final(b, task, judged) for a, b in pairs]
        areas = [_area(a, task, judged) - _area(b, task, judged) for a, b in pairs]
        rows.append(Answer(entry | {"judged": judged}, final, areas))
    return rows


def confirmed_lines(
    study: StagedStudy, results: Results, choices: Choices, task: str, cell: str
) -> dict[int, Line]:
    """Return the lines of a cell in the confirmation at the chosen learning rate, by seed."""
    rate = choices.learning_rate(task, cell)
    return {
        run.seed: line
        for run, line in results.of("confirm", task, cell).items()
        if run.seed in study.confirm_seeds and run.learning_rate == rate
    }


def comparison_table(comparisons: Sequence[Answer]) -> str:
    """Return the table of comparisons, with Holm's correction over the primary ones."""
    primary = [answer for answer in comparisons if answer.entry["primary"]]
    corrected = dict(
        zip(map(id, primary), holm([p_value(a.outcome) for a in primary]), strict=True)
    )
    rows = [
        [
            *(answer.entry[key] for key in ("task", "cell", "against")),
            str(len(answer.final)),
            "the support" if answer.entry["judged"] == "support" else "all tokens",
            show(*interval(answer.final), sign=True),
            show(*interval(answer.area), sign=True),
            {"final": "final", "area": "area"}[answer.entry["outcome"]],
            _number(p_value(answer.outcome)),
            _number(corrected[id(answer)]) if id(answer) in corrected else "not primary",
            _number(detectable(answer.outcome)),
        ]
        for answer in comparisons
    ]
    head = ["task", "cell", "against", "seeds", "judged on", "final, difference"]
    head += ["area, difference", "p tests", "p", "p (Holm)", "detectable (80 %)"]
    return _markdown(head, rows)


def cell_table(study: StagedStudy, results: Results, choices: Choices, task: str) -> str:
    """Return the table of a task's cells in the confirmation: means over seeds."""
    options, rows = study.tasks[task], []
    for cell in choices.confirmed(task):
        lines = list(confirmed_lines(study, results, choices, task, cell).values())
        if lines:
            rate = f"{choices.learning_rate(task, cell):g}"
            rows.append([cell, rate, str(len(lines)), *_figures(lines, options)])
    return _markdown(["cell", "learning rate", "seeds", *_figure_names(options)], rows)


def screening_table(study: StagedStudy, results: Results, task: str) -> str:
    """Return the table of a task's screening: areas at all learning rates, other columns at the best."""
    options, rows = study.tasks[task], []
    for cell in study.cells_of(task):
        by_rate: dict[float, list[Line]] = {}
        for run, line in results.of("screen", task, cell).items():
            if run.seed in study.screen_seeds:
                by_rate.setdefault(run.learning_rate, []).append(line)
        scores = {
            rate: statistics.mean(_area(line, options, options.judged) for line in lines)
            for rate, lines in sorted(by_rate.items())
        }
        if scores:
            best = max(scores, key=lambda rate: scores[rate])
            all_scores = ", ".join(f"{rate:g}: {score:.3f}" for rate, score in scores.items())
            rows.append([cell, f"{best:g}", all_scores, *_figures(by_rate[best], options)])
    return _markdown(["cell", "best rate", "area by rate", *_figure_names(options)], rows)


def unequal_starts(results: Results) -> list[str]:
    """Return a warning for each task and seed whose runs do not start from the same policy."""
    starts: dict[tuple[str, int], dict[tuple[float, float], Run]] = {}
    for run, line in results.lines.items():
        values = tuple(line["start"].get(key, math.nan) for key in ("pass_at_1", "greedy_accuracy"))
        starts.setdefault((run.task, run.seed), {}).setdefault(values, run)
    return [
        f"{task}, seed {seed}: runs start from different policies: "
        + ", ".join(f"{run.cell} ({run.stage}) {values[0]:.4f}" for values, run in runs.items())
        for (task, seed), runs in starts.items()
        if len(runs) > 1
    ]


def show(mean: float, half: float, sign: bool = False, digits: int = 3) -> str:
    """Return a mean with the half width of its interval, as text; without nan."""
    if math.isnan(mean):
        return ""
    value = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return value if math.isnan(half) else f"{value} ± {half:.{digits}f}"


def _figure_names(task: Task) -> list[str]:
    name = "pass@1" if task.metric == "pass_at_1" else "reward"
    reach = [f"rollouts to {task.target:g}"] if task.target is not None else []
    names = [f"{name} before", f"{name} after", "on the support", "greedy", "area"]
    names += ["area on the support", *reach, "KL", "clip fraction", "seconds per update"]
    return names


def _figures(lines: Sequence[Line], task: Task) -> list[str]:
    """Return the values of the columns `_figure_names`: means over the runs of a cell."""
    support = f"support_{task.metric}"
    on_support = [line["final"][support] for line in lines if support in line["final"]]
    on_curves = [
        _area(line, task, "support") for line in lines if any(support in p for p in line["curve"])
    ]
    reach = [_reach(lines, task)] if task.target is not None else []
    return [
        f"{statistics.mean(line['start'][task.metric] for line in lines):.3f}",
        show(*interval([line["final"][task.metric] for line in lines])),
        show(*interval(on_support)),
        _mean(line["final"].get("greedy_accuracy") for line in lines),
        show(*interval([_area(line, task, "whole") for line in lines])),
        show(*interval(on_curves)),
        *reach,
        _mean((line["final"].get("kl") for line in lines), 4),
        _mean((line["final"].get("clip_fraction") for line in lines), 4),
        _mean((line["seconds_per_update"] for line in lines), 2),
    ]


def _reach(lines: Sequence[Line], task: Task) -> str:
    """Return the mean number of rollouts to the target, and the number of runs that never reach it."""
    assert task.target is not None
    counts = [first_reach(points_of(line, task.metric, task.judged), task.target) for line in lines]
    there = [count for count in counts if count is not None]
    missed = f" ({len(counts) - len(there)} never)" if len(there) < len(counts) else ""
    return (f"{statistics.mean(there):.1f}" if there else "") + missed


def _final(line: Line, task: Task, judged: str) -> float:
    return value_of(line["final"], task.metric, judged)


def _area(line: Line, task: Task, judged: str) -> float:
    return area(points_of(line, task.metric, judged))


def _mean(values: Iterable[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else ""


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
