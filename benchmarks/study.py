"""Compares algorithms over tasks and seeds, paired by seed; continues after a stop.

    python benchmarks/study.py benchmarks/studies/methods.yaml --jobs 2
    python benchmarks/study.py benchmarks/studies/verdict.yaml --jobs 2 --stage screen
    python benchmarks/study.py benchmarks/studies/verdict.yaml --list

A study names tasks, cells and seeds. A cell is a configuration that is merged into a task, such as an
algorithm. Each task and seed has one warm-up, so all its cells start from the same weights. They also
see the same prompts. `arguments` of a task or a cell go to the command line.

**Without stages**, each run is a separate process. A run is finished if its folder holds
`summary.json`. The table has means over seeds and paired differences from the cell `against`, with
95 % t-intervals. For each value of `levels` it also has the number of rollouts until held-out pass@1
reaches this value.

**With `screen` and `confirm`**, a study has two stages:

* The screening runs each cell at several learning rates, on the seeds of `screen`. The score of a
  rate is the area under the curve of the task's held-out metric.
* The confirmation first stores the best rates in `chosen.json`. It then runs the pairs of cells of
  `confirm.comparisons` on other seeds. A list of cells stands for the one with the best score.
  Holm's method corrects the p-values of the primary comparisons.

Each finished run is a line of `results.jsonl`, and is not repeated on any machine. Delete the line to
repeat the run. Both files are in the folder `results` of the study, with tables and pictures.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparing import plain, plain_drawing, plain_table, stages, tables
from comparing.choices import Choices
from comparing.drawing import draw_curves, draw_differences
from comparing.results import Results, Run
from comparing.studies import StagedStudy, is_staged, read_staged

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError, print_mistake


def main(arguments: list[str] | None = None) -> int:
    """Run a study; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        at_least("study", 1, jobs=options.jobs, threads=options.threads)
        run = _staged if is_staged(options.study) else _plain
        failed = run(options)
    except UserError as error:
        return print_mistake(str(error))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on", file=sys.stderr)
        return 130
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("study", type=Path, help="a study file, such as benchmarks/studies/methods.yaml")
    add("--jobs", type=int, default=2, help="number of runs side by side")
    add("--threads", type=int, default=1, help="number of torch threads of a run")
    add("--seeds", type=int, nargs="*", help="use only these seeds of the study")
    add("--tasks", nargs="*", help="use only these tasks of the study")
    add("--cells", nargs="*", help="use only these cells of the study")
    add("--report", action="store_true", help="run nothing; report on the finished runs")
    staged = parser.add_argument_group("studies with stages")
    add = staged.add_argument
    add("--stage", choices=("screen", "confirm", "all"), default="all", help="the runs to do")
    add("--budget-minutes", type=float, default=math.inf, help="start no run after this time")
    add("--list", action="store_true", help="run nothing; list the missing runs")
    return parser


def _plain(options: argparse.Namespace) -> list[str]:
    """Run a study without stages; return the logs of failed runs."""
    study = plain.Study.read(options.study)
    study = replace(
        study,
        seeds=_only(study.seeds, options.seeds),
        tasks=_chosen(study.tasks, options.tasks),
        cells=_chosen(study.cells, options.cells),
    )
    failed = [] if options.report else plain.run_all(study, options.jobs, options.threads)
    text = plain_table.table(study)
    print(text)
    study.runs.mkdir(parents=True, exist_ok=True)
    (study.runs / "results.md").write_text(text + "\n")
    plain_drawing.draw(study, study.runs / "results.png")
    return failed


def _staged(options: argparse.Namespace) -> list[str]:
    """Run a study with stages; return the logs of failed runs."""
    study = read_staged(options.study)
    of_tasks = replace(study, tasks=_chosen(study.tasks, options.tasks))
    results = Results(study.results)
    deadline = time.monotonic() + 60 * options.budget_minutes
    _chosen(study.cells, options.cells)
    _only([*study.screen_seeds, *study.confirm_seeds], options.seeds)
    worker = stages.Worker(study, results, options.threads, deadline)

    def selected(runs: Iterable[Run]) -> list[Run]:
        return [
            run
            for run in stages.missing(list(runs), results)
            if options.cells is None or run.cell in options.cells
            if options.seeds is None or run.seed in options.seeds
        ]

    screened = selected(stages.screening(of_tasks)) if options.stage != "confirm" else []
    choices = Choices.read(study.results)
    choices.check(study)
    if options.list:
        expected = stages.provisional(of_tasks, choices)
        confirmed = selected(stages.confirmation(of_tasks, expected))
        _list(screened, confirmed if options.stage != "screen" else [], results)
        return []
    if not options.report:
        # the choice is stored before the confirmation
        worker.do(screened, options.jobs)
        if options.stage != "screen":
            choices = stages.store_choices(study, results)
            worker.do(selected(stages.confirmation(of_tasks, choices)), options.jobs)
    _report(study, results, choices)
    return worker.failed


def _list(screened: list[Run], confirmed: list[Run], results: Results) -> None:
    """Print the missing runs with their estimated minutes."""
    for name, runs in (("screening", screened), ("confirmation", confirmed)):
        seconds = stages.estimate(runs, results)
        for run, estimated in zip(runs, seconds, strict=True):
            print(f"{run.name}  " + ("?" if math.isnan(estimated) else f"{estimated / 60:.1f} min"))
        known = sum(s for s in seconds if not math.isnan(s)) / 60
        unknown = sum(map(math.isnan, seconds))
        more = f" and {unknown} runs of unknown length" if unknown else ""
        print(f"{name}: {len(runs)} runs missing, {known:.0f} minutes of one core{more}\n")


def _report(study: StagedStudy, results: Results, choices: Choices) -> None:
    """Print the tables, and write them and the pictures beside the results."""
    comparisons = tables.answers(study, results, choices)
    parts = ["## Comparisons", tables.comparison_table(comparisons)]
    for task in study.tasks:
        if choices.confirmed(task):
            parts += [f"## Confirmation: {task}", tables.cell_table(study, results, choices, task)]
    for task in study.tasks:
        parts += [f"## Screening: {task}", tables.screening_table(study, results, task)]
    warnings = tables.unequal_starts(results)
    parts += ["## Unequal starts", "\n".join(warnings)] if warnings else []
    text = "\n\n".join(parts)
    print(text)
    study.results.mkdir(parents=True, exist_ok=True)
    (study.results / "tables.md").write_text(text + "\n")
    draw_curves(study, results, choices, study.results / "curves.png")
    draw_differences(comparisons, study.results / "differences.png")


def _only(seeds: list[int], chosen: list[int] | None) -> list[int]:
    """Return the seeds of a study that the command line names."""
    unknown = sorted(set(chosen or ()) - set(seeds))
    if unknown:
        has = ", ".join(map(str, seeds))
        raise UserError(f"the study has no seed {unknown[0]}; it has {has}")
    return [seed for seed in seeds if chosen is None or seed in chosen]


def _chosen(content: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """Return the entries of a study that the command line names."""
    unknown = sorted(set(names or ()) - set(content))
    if unknown:
        raise UserError(f"the study has no {unknown[0]!r}; it has {', '.join(content)}")
    return {name: value for name, value in content.items() if names is None or name in names}


if __name__ == "__main__":
    sys.exit(main())
