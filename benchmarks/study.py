"""Compares algorithms over tasks and seeds, paired by seed; continues after a stop.

    python benchmarks/study.py benchmarks/studies/mpo.yaml --jobs 2
    python benchmarks/study.py benchmarks/studies/verdict.yaml --jobs 2 --stage screen
    python benchmarks/study.py benchmarks/studies/verdict.yaml --list

A study names tasks, cells and seeds; a cell is a configuration laid over a task. Warm-ups come
first, one per task and seed. All cells of a seed thus start from the same weights and see the same
prompts. `arguments` of a task or a cell go to the command line.

**Without stages**, each run is a process of its own, and one whose folder holds `summary.json` is
finished. The table gives means over seeds and paired differences from the cell named under
`against`, with 95 % t-intervals. `levels` lists values of held-out pass@1: the table then counts
the rollouts until each is reached.

**With `screen` and `confirm`**, each cell is run at several learning rates on the seeds of `screen`.
The rate with the largest area under the curve of held-out accuracy goes to `chosen.json`, and the
confirmation reads it. `confirm.comparisons` names pairs of cells, which are run on other seeds. A
list of cells stands for the one that the screening finds best. Each finished run is a line of
`results.jsonl`, and is not run again on any machine. Both files are in the folder `results` of the
study, with the tables and pictures. p-values of all primary comparisons are corrected by Holm's
method. Delete a line to repeat its run.
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

from lightning_mpo.errors import UserError, print_mistake


def main(arguments: list[str] | None = None) -> int:
    """Run a study; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        run = _staged if is_staged(options.study) else _plain
        failed = run(options)
    except UserError as error:
        return print_mistake(str(error))
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("study", type=Path, help="a study file, such as benchmarks/studies/mpo.yaml")
    add("--jobs", type=int, default=2, help="runs side by side")
    add("--threads", type=int, default=1, help="torch threads of a run")
    add("--seeds", type=int, nargs="*", help="of the study's seeds, only these")
    add("--tasks", nargs="*", help="of the study's tasks, only these")
    add("--cells", nargs="*", help="of the study's cells, only these")
    add("--report", action="store_true", help="run nothing; report what is there")
    staged = parser.add_argument_group("studies with stages")
    add = staged.add_argument
    add("--stage", choices=("screen", "confirm", "all"), default="all", help="which runs to do")
    add("--budget-minutes", type=float, default=math.inf, help="start no run after this time")
    add("--list", action="store_true", help="run nothing; list the runs that are left")
    return parser


def _plain(options: argparse.Namespace) -> list[str]:
    """Run a study without stages; return what failed."""
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
    """Run a study with stages; return what failed."""
    study = read_staged(options.study)
    narrow = replace(study, tasks=_chosen(study.tasks, options.tasks))
    results = Results(study.results)
    deadline = time.monotonic() + 60 * options.budget_minutes
    worker = stages.Worker(study, results, options.threads, deadline)

    def of_interest(runs: Iterable[Run]) -> list[Run]:
        return [
            run
            for run in stages.left(list(runs), results)
            if options.cells is None or run.cell in options.cells
            if options.seeds is None or run.seed in options.seeds
        ]

    screened = of_interest(stages.screening(narrow)) if options.stage != "confirm" else []
    choices = Choices.read(study.results)
    if options.list:
        expected = stages.provisional(narrow, choices)
        confirmed = of_interest(stages.confirmation(narrow, expected))
        _list(screened, confirmed if options.stage != "screen" else [], results)
        return []
    if not options.report:
        # the choice is stored before the confirmation
        worker.do(screened, options.jobs)
        if options.stage != "screen":
            choices = stages.settle(study, results)
            worker.do(of_interest(stages.confirmation(narrow, choices)), options.jobs)
    _report(study, results, choices)
    return worker.failed


def _list(screened: list[Run], confirmed: list[Run], results: Results) -> None:
    """Print the runs that are left with their estimated minutes."""
    for name, runs in (("screening", screened), ("confirmation", confirmed)):
        seconds = stages.estimate(runs, results)
        for run, estimated in zip(runs, seconds, strict=True):
            print(f"{run.name}  " + ("?" if math.isnan(estimated) else f"{estimated / 60:.1f} min"))
        known = sum(s for s in seconds if not math.isnan(s)) / 60
        unknown = sum(map(math.isnan, seconds))
        more = f" and {unknown} runs of unknown length" if unknown else ""
        print(f"{name}: {len(runs)} runs left, {known:.0f} minutes of one core{more}\n")


def _report(study: StagedStudy, results: Results, choices: Choices) -> None:
    """Print the tables, and write them and the pictures beside the results."""
    found = tables.answers(study, results, choices)
    parts = ["## Comparisons", tables.comparison_table(found)]
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
    draw_differences(found, study.results / "differences.png")


def _only(values: list[int], wanted: list[int] | None) -> list[int]:
    return [value for value in values if wanted is None or value in wanted]


def _chosen(content: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """Return the entries of a study that the command line names."""
    unknown = sorted(set(names or ()) - set(content))
    if unknown:
        raise UserError(f"the study has no {unknown[0]!r}; there are {', '.join(content)}")
    return {name: value for name, value in content.items() if names is None or name in names}


if __name__ == "__main__":
    sys.exit(main())
