"""Screening, choice and confirmation of a study: lists the missing runs, and does them."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparing.choices import Choices, choose, resolved
from comparing.lanes import Fit, work
from comparing.results import Results, Run, summarise
from comparing.studies import LEARNING_RATE, StagedStudy, Task
from lightning_mpo.errors import UserError


def screening(study: StagedStudy) -> list[Run]:
    """Return all runs of the screening, one task after the other."""
    return [
        Run("screen", task, cell, seed, rate)
        for task in study.tasks
        for seed in study.screen_seeds
        for cell in study.cells_of(task)
        for rate in study.rates_of(task)
    ]


def confirmation(study: StagedStudy, choices: Choices) -> list[Run]:
    """Return all runs of the confirmation, one seed after the other, so that pairs complete early."""
    return [
        Run("confirm", task, cell, seed, choices.learning_rate(task, cell))
        for seed in study.confirm_seeds
        for task in study.tasks
        for cell in choices.confirmed(task)
    ]


def missing(runs: Sequence[Run], results: Results) -> list[Run]:
    """Return the runs without a line in the results."""
    return [run for run in runs if run not in results.lines]


def store_choices(study: StagedStudy, results: Results) -> Choices:
    """Choose for each task whose screening is complete, and return all choices, which are on disk.

    Raises:
        UserError: a stored choice does not fit the screening or the study.
    """
    choices = Choices.read(study.results)
    for task in study.tasks:
        runs = [run for run in screening(study) if run.task == task]
        if runs and not missing(runs, results):
            choices.add(task, choose(study, results, task))
    choices.write()
    return choices


def provisional(study: StagedStudy, choices: Choices) -> Choices:
    """Return the choices for a list of runs: a task without a stored one gets the first candidates."""
    tasks = dict(choices.tasks)
    for task in study.tasks:
        rate = study.rates_of(task)[0]
        cells = {cell: {"learning_rate": rate, "score": 0.0} for cell in study.cells_of(task)}
        tasks.setdefault(task, {"cells": cells, "comparisons": resolved(study, task, cells)})
    return Choices(choices.path, tasks)


class Worker:
    """Does runs, and adds their results.

    Args:
        study: the study.
        results: gets a line for each finished run.
        threads: number of torch threads of a run.
        deadline: time on the clock `time.monotonic` after which no run starts, seconds.
    """

    def __init__(
        self, study: StagedStudy, results: Results, threads: int, deadline: float = math.inf
    ) -> None:
        self.study, self.results = study, results
        self.threads, self.deadline = threads, deadline
        self.failed: list[str] = []
        self._lock = threading.Lock()
        self._warmups: dict[tuple[str, int], threading.Lock] = {}
        self._failed_warmups: set[tuple[str, int]] = set()
        """Tasks and seeds whose warm-up has failed."""

    def do(self, runs: Sequence[Run], lanes: int) -> None:
        """Do runs in their order; `failed` gets the logs of those that fail.

        Args:
            runs: the runs.
            lanes: number of runs side by side.

        Raises:
            UserError: another process does runs of this study.
        """
        self.study.runs.mkdir(parents=True, exist_ok=True)
        with (self.study.runs / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process does runs in {self.study.runs}; wait for it, or stop it"
                ) from error
            jobs = [lambda fit, run=run: self._do(fit, run) for run in runs]
            work(jobs, lanes, self.threads)

    def _do(self, fit: Fit, run: Run) -> None:
        """Do one run, after its warm-up."""
        if time.monotonic() >= self.deadline or not self._warm(fit, run.task, run.seed):
            return
        # an unfinished run starts again from the beginning
        folder = self.study.runs / run.name
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        code = fit(self._arguments(run, folder), folder / "run.log")
        seconds = time.monotonic() - started
        # the line of its results
        summary = folder / "summary.json"
        if code or not summary.is_file():
            self._fail(folder / "run.log")
            return
        content = summarise(json.loads(summary.read_text()), seconds)
        with self._lock:
            self.results.add(run, content)
        print(f"done   {run.name}  {seconds:.0f} s", flush=True)

    def _arguments(self, run: Run, folder: Path) -> list[str]:
        """Return the arguments of `lightning-mpo` for a run."""
        task, cell = self.study.tasks[run.task], self.study.cells[run.cell]
        options = [
            *("fit", "-c", task.config, "-c", cell.config),
            *("--seed_everything", run.seed, "--trainer.default_root_dir", folder),
            *(LEARNING_RATE, run.learning_rate, *task.arguments, *cell.arguments),
        ]
        return [
            json.dumps(option) if isinstance(option, dict) else str(option) for option in options
        ]

    def _warm(self, fit: Fit, name: str, seed: int) -> bool:
        """Fit the warm-up of a task and seed if its checkpoint is missing; return whether it succeeded."""
        task = self.study.tasks[name]
        with self._lock:
            lock = self._warmups.setdefault((name, seed), threading.Lock())
        with lock:
            path = checkpoint_of(task, seed)
            if path is None or path.is_file() or (name, seed) in self._failed_warmups:
                return (name, seed) not in self._failed_warmups
            assert task.warmup is not None
            log = self.study.runs / f"warm-{name}-seed{seed}.log"
            started = time.monotonic()
            code = fit(["fit", "-c", task.warmup, "--seed_everything", str(seed)], log)
            if code or not path.is_file():
                self._failed_warmups.add((name, seed))
                self._fail(log)
                return False
            print(f"warm   {name} seed {seed}  {time.monotonic() - started:.0f} s", flush=True)
            return True

    def _fail(self, log: Path) -> None:
        with self._lock:
            if str(log) not in self.failed:
                self.failed.append(str(log))
        print(f"FAILED {log}", flush=True)


def checkpoint_of(task: Task, seed: int) -> Path | None:
    """Return the checkpoint of a warm-up; None: the task has no warm-up."""
    if task.warmup is None or task.checkpoint is None:
        return None
    return Path(task.checkpoint.format(seed=seed))


def estimate(runs: Sequence[Run], results: Results) -> list[float]:
    """Return the estimated seconds of each run; nan if no run has finished.

    The estimate is the mean over finished runs of the same cell and task. Without them it is the
    mean of the task, else of the cell, else of all.
    """
    seconds: dict[Any, list[float]] = {}
    for run, line in results.lines.items():
        for key in ((run.task, run.cell), (run.task, None), (None, run.cell), None):
            seconds.setdefault(key, []).append(line["seconds"])
    return [
        next(
            (
                statistics.mean(seconds[key])
                for key in ((run.task, run.cell), (run.task, None), (None, run.cell), None)
                if key in seconds
            ),
            math.nan,
        )
        for run in runs
    ]
