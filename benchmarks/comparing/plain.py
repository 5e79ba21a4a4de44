"""A study without stages: tasks x cells x seeds, and its missing runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparing.reading import read_study, section


@dataclass(frozen=True)
class Study:
    """The content of a study file."""

    runs: Path
    seeds: list[int]
    tasks: dict[str, dict[str, str]]
    cells: dict[str, dict[str, Any]]
    levels: tuple[float, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study file."""
        content = section(read_study(path), "", path, needs=("runs", "seeds", "tasks", "cells"))
        levels = tuple(content.get("levels", ()))
        return cls(
            Path(content["runs"]), content["seeds"], content["tasks"], content["cells"], levels
        )

    def folder(self, task: str, cell: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.runs / task / cell / f"seed{seed}"

    def summary(self, task: str, cell: str, seed: int) -> dict[str, Any] | None:
        """Return the `summary.json` of a run; None: the run has not finished."""
        path = self.folder(task, cell, seed) / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def summaries(self, task: str, cell: str) -> dict[int, dict[str, Any]]:
        """Return the `summary.json` of each finished run of a cell, by seed."""
        return {seed: s for seed in self.seeds if (s := self.summary(task, cell, seed)) is not None}

    def update_memory(self, task: str, cell: str) -> list[int]:
        """Return the peak memory of updates of each run with `MemoryAccounting`, bytes above that before loading."""
        paths = [self.folder(task, cell, seed) / "memory.json" for seed in self.seeds]
        runs = [json.loads(path.read_text()) for path in paths if path.is_file()]
        phases = ("forward", "backward", "optimiser")
        return [
            max(run["peaks"][phase]["in_use"] for phase in phases) - run["baseline"] for run in runs
        ]


def run_all(study: Study, jobs: int, threads: int) -> list[str]:
    """Do the missing runs; return the logs of those that failed."""
    warmups: list[Callable[[], str | None]] = []
    for task in study.tasks.values():
        for seed in study.seeds:
            checkpoint = Path(task.get("checkpoint", ".").format(seed=seed))
            if "warmup" in task and not checkpoint.is_file():
                command = ["-c", task["warmup"], "--seed_everything", str(seed)]
                warmups.append(lambda c=command, p=checkpoint: _fit(c, p.parent, threads))  # type: ignore[misc]
    cells: list[Callable[[], str | None]] = []
    for seed in study.seeds:
        for name, task in study.tasks.items():
            for cell, options in study.cells.items():
                folder = study.folder(name, cell, seed)
                if study.summary(name, cell, seed) is None:
                    command = [
                        "-c",
                        task["config"],
                        "-c",
                        options["config"],
                        "--seed_everything",
                        str(seed),
                    ]
                    command += [
                        "--trainer.default_root_dir",
                        str(folder),
                        *map(str, options.get("arguments", ())),
                    ]
                    cells.append(lambda c=command, f=folder: _fit(c, f, threads))  # type: ignore[misc]
    failed: list[str] = []
    for stage in (warmups, cells):
        with ThreadPoolExecutor(jobs) as pool:
            failed += [error for error in pool.map(lambda job: job(), stage) if error]
    return failed


def _fit(arguments: list[str], folder: Path, threads: int) -> str | None:
    """Run `lightning-mpo fit` with its output in `run.log`; return this file if the run failed."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (folder / "run.log").open("w") as log:
        command = [sys.executable, "-m", "lightning_mpo", "fit", *arguments]
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    print(f"{'done  ' if code == 0 else 'FAILED'} {folder}", flush=True)
    return None if code == 0 else f"{folder}/run.log"
