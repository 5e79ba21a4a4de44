"""The file of a study with two stages: tasks, cells, screening and confirmation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparing.reading import read_study, section, values
from lightning_mpo.errors import UserError

METRICS = ("pass_at_1", "reward")
OUTCOMES = ("final", "area")
JUDGED = ("whole", "support")
LEARNING_RATE = "--model.init_args.optimizer.init_args.lr"


@dataclass(frozen=True)
class Task:
    """A task of a study.

    Args:
        config: configuration of the task.
        warmup: configuration of the stage that makes the checkpoint; None: no warm-up.
        checkpoint: file of the warm-up, with `{seed}` for the seed.
        metric: the metric that is compared: "pass_at_1", or "reward" for the mean reward.
        judged: where the metric is measured: the "whole" vocabulary, or the "support".
        target: a value of the metric; the table has the number of rollouts until a run reaches it.
        learning_rates: learning rates of the screening; None: those of `screen`.
        cells: names of the cells of the screening; None: those of `screen`.
        arguments: additional arguments of the command line, before those of a cell.
    """

    config: str
    warmup: str | None = None
    checkpoint: str | None = None
    metric: str = "pass_at_1"
    judged: str = "whole"
    target: float | None = None
    learning_rates: tuple[float, ...] | None = None
    cells: tuple[str, ...] | None = None
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A configuration that is merged into that of a task, such as an algorithm.

    Args:
        config: the configuration.
        arguments: additional arguments of the command line.
    """

    config: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A comparison of two cells on a task, in the confirmation.

    Args:
        task: name of the task.
        cell: name of the cell, or a list of names. A list stands for the cell with the best score in
            the screening.
        against: name of the other cell, or a list of names.
        outcome: the value that the p-value tests: "final" metric, or "area" under its curve.
        judged: where the metric is measured, "whole" or "support"; None: as the task.
        primary: whether Holm's correction includes the comparison.
    """

    task: str
    cell: str | tuple[str, ...]
    against: str | tuple[str, ...]
    outcome: str = "final"
    judged: str | None = None
    primary: bool = True


@dataclass(frozen=True)
class StagedStudy:
    """A study with a screening and a confirmation.

    Args:
        runs: folder of logs and checkpoints.
        results: folder of `results.jsonl`, `chosen.json`, tables and pictures.
        tasks: tasks by name.
        cells: cells by name.
        screen_seeds: seeds of the screening.
        learning_rates: learning rates of the screening, unless a task has its own.
        screened_cells: names of the cells of the screening, unless a task has its own.
        confirm_seeds: seeds of the confirmation.
        comparisons: comparisons of the confirmation.
    """

    runs: Path
    results: Path
    tasks: dict[str, Task]
    cells: dict[str, Cell]
    screen_seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    screened_cells: tuple[str, ...]
    confirm_seeds: tuple[int, ...]
    comparisons: tuple[Comparison, ...] = field(default=())

    def cells_of(self, task: str) -> tuple[str, ...]:
        """Return the names of the cells of a task in the screening."""
        return self.tasks[task].cells or self.screened_cells

    def rates_of(self, task: str) -> tuple[float, ...]:
        """Return the learning rates of a task in the screening."""
        return self.tasks[task].learning_rates or self.learning_rates


def is_staged(path: Path) -> bool:
    """Return whether a study file has a screening, and so two stages."""
    return "screen" in read_study(path)


def read_staged(path: Path) -> StagedStudy:
    """Read the file of a study with two stages.

    Raises:
        UserError: a key or a name is unknown or missing, or a seed is in both stages.
    """
    needs = ("runs", "results", "tasks", "cells", "screen")
    content = section(read_study(path), "", path, needs=needs, takes=("confirm",))
    needs = ("seeds", "learning_rates")
    screen = section(content["screen"], "screen", path, needs=needs, takes=("cells",))
    confirm = content.get("confirm", {"seeds": []})
    confirm = section(confirm, "confirm", path, needs=("seeds",), takes=("comparisons",))
    # tasks, cells and comparisons
    tasks = {
        name: _build(Task, options, f"tasks.{name}", path)
        for name, options in section(content["tasks"], "tasks", path).items()
    }
    cells = {
        name: _build(Cell, options, f"cells.{name}", path)
        for name, options in section(content["cells"], "cells", path).items()
    }
    comparisons = tuple(
        _build(Comparison, options, f"confirm.comparisons[{i}]", path)
        for i, options in enumerate(confirm.get("comparisons", ()))
    )
    study = StagedStudy(
        runs=Path(content["runs"]),
        results=Path(content["results"]),
        tasks=tasks,
        cells=cells,
        screen_seeds=values(screen["seeds"], "screen.seeds", path, int),
        learning_rates=values(screen["learning_rates"], "screen.learning_rates", path, float),
        screened_cells=tuple(screen.get("cells", cells)),
        confirm_seeds=values(confirm["seeds"], "confirm.seeds", path, int),
        comparisons=comparisons,
    )
    _check(study, path)
    return study


def names_of(cell: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the names on one side of a comparison."""
    return (cell,) if isinstance(cell, str) else cell


def _build(kind: type[Any], options: Any, place: str, path: Path) -> Any:
    options = section(options, place, path, takes=kind.__dataclass_fields__)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    if given.get("learning_rates"):
        rates = options["learning_rates"]
        given["learning_rates"] = values(rates, f"{place}.learning_rates", path, float)
    try:
        return kind(**given)
    except TypeError as error:
        raise UserError(f"{path}: `{place}`: {str(error).partition('() ')[2]}") from error


def _check(study: StagedStudy, path: Path) -> None:
    """Refuse names that are unknown, and seeds that are in both stages."""
    both = sorted(set(study.screen_seeds) & set(study.confirm_seeds))
    if both:
        raise UserError(
            f"{path}: seed {both[0]} is in `screen.seeds` and in `confirm.seeds`; the confirmation "
            "needs seeds that the screening has not seen"
        )
    for name, task in study.tasks.items():
        if not study.rates_of(name):
            raise UserError(f"{path}: the task {name} needs at least one of `learning_rates`")
        _one_of(task.metric, METRICS, f"tasks.{name}.metric", path)
        _one_of(task.judged, JUDGED, f"tasks.{name}.judged", path)
        for cell in study.cells_of(name):
            _one_of(cell, study.cells, f"cells of the task {name}", path)
    for i, comparison in enumerate(study.comparisons):
        place = f"confirm.comparisons[{i}]"
        _one_of(comparison.task, study.tasks, f"{place}.task", path)
        _one_of(comparison.outcome, OUTCOMES, f"{place}.outcome", path)
        _one_of(comparison.judged, (*JUDGED, None), f"{place}.judged", path)
        if not names_of(comparison.cell) or not names_of(comparison.against):
            raise UserError(f"{path}: `{place}` names no cell on one side")
        for cell in (*names_of(comparison.cell), *names_of(comparison.against)):
            _one_of(cell, study.cells_of(comparison.task), place, path)


def _one_of(value: object, known: Iterable[object], place: str, path: Path) -> None:
    if value not in known:
        names = ", ".join(map(str, known))
        raise UserError(f"{path}: `{place}`: {value!r} must be one of {names}")
