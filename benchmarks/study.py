"""Compares algorithms over tasks and seeds, paired by seed; continues after a stop.

    python benchmarks/study.py benchmarks/studies/mpo.yaml --jobs 2

A study names tasks, cells and seeds; a cell is a configuration laid over a task. Each run is a
process of its own. A run whose folder holds `summary.json` is finished and is not run again.
Warm-ups come first, one per task and seed. All cells of a seed thus start from the same weights and
see the same prompts. The table gives means over seeds. It also gives paired differences from the
cell named under `against`, with 95 % t-intervals. `arguments` of a cell go to the command line.
`levels` lists values of held-out pass@1: the table then counts the rollouts until each is reached.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy import stats


@dataclass(frozen=True)
class Study:
    """A study file, read."""

    runs: Path
    seeds: list[int]
    tasks: dict[str, dict[str, str]]
    cells: dict[str, dict[str, Any]]
    levels: tuple[float, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study file."""
        content = yaml.safe_load(path.read_text())
        levels = tuple(content.get("levels", ()))
        return cls(
            Path(content["runs"]), content["seeds"], content["tasks"], content["cells"], levels
        )

    def folder(self, task: str, cell: str, seed: int) -> Path:
        """Where a run writes."""
        return self.runs / task / cell / f"seed{seed}"

    def summary(self, task: str, cell: str, seed: int) -> dict[str, Any] | None:
        """What a finished run wrote."""
        path = self.folder(task, cell, seed) / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def summaries(self, task: str, cell: str) -> dict[int, dict[str, Any]]:
        """What the finished runs of a cell wrote, by seed."""
        return {seed: s for seed in self.seeds if (s := self.summary(task, cell, seed)) is not None}

    def update_memory(self, task: str, cell: str) -> list[int]:
        """Return the peak of the updates of each run with `MemoryAccounting`, in bytes in use above the process before loading."""
        paths = [self.folder(task, cell, seed) / "memory.json" for seed in self.seeds]
        runs = [json.loads(path.read_text()) for path in paths if path.is_file()]
        phases = ("forward", "backward", "optimiser")
        return [
            max(run["peaks"][phase]["in_use"] for phase in phases) - run["baseline"] for run in runs
        ]


# --- running ----------------------------------------------------------------------------------------------------------


def run_all(study: Study, jobs: int, threads: int) -> list[str]:
    """Run what is missing; return what failed."""
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
    """Run `lightning-mpo fit` with its output in the folder; return what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (folder / "run.log").open("w") as log:
        command = [sys.executable, "-m", "lightning_mpo", "fit", *arguments]
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    print(f"{'done  ' if code == 0 else 'FAILED'} {folder}", flush=True)
    return None if code == 0 else f"{folder}/run.log"


# --- reading ----------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % t-interval; nan for fewer than two values."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    t = stats.t.ppf(0.975, len(values) - 1)
    return statistics.mean(values), float(t * stats.sem(values))


def detectable(values: Sequence[float]) -> float:
    """Return the true difference that a study of this size and spread would find in 80 % of cases."""
    freedom = len(values) - 1
    if freedom < 1:
        return math.nan
    quantiles = stats.t.ppf(0.975, freedom) + stats.t.ppf(0.8, freedom)
    return float(quantiles * stats.sem(values))


def rollouts_to(summary: dict[str, Any], level: float) -> float | None:
    """Return after how many rollouts held-out pass@1 reaches a level, between validations on a straight line."""
    seen, before, reached = 0, (0, summary["warmup"]["pass_at_1"]), None
    for point in summary["curve"]:
        seen += "accuracy" in point
        if "validation" in point and reached is None:
            now = (seen, point["validation"])
            if now[1] >= level:
                rise = (level - before[1]) / (now[1] - before[1]) if now[1] > before[1] else 0.0
                reached = before[0] + max(rise, 0.0) * (now[0] - before[0])
            before = now
    return reached


def _reach(
    found: dict[int, dict[str, Any]], level: float, base: dict[int, dict[str, Any]] | None = None
) -> str:
    """Return the mean over the seeds that reached a level, how many did not, and the paired difference from a base."""
    counts = {seed: rollouts_to(summary, level) for seed, summary in found.items()}
    there = [count for count in counts.values() if count is not None]
    missed = f" ({len(counts) - len(there)} never)" if len(there) < len(counts) else ""
    text = (f"{statistics.mean(there):.1f}" if there else "") + missed
    others = {seed: rollouts_to(summary, level) for seed, summary in (base or {}).items()}
    gaps = [
        count - others[seed]
        for seed, count in counts.items()
        if count is not None and others.get(seed) is not None
    ]
    return f"{text}, paired {_show(*interval(gaps), sign=True, digits=1)}" if gaps else text


def table(study: Study) -> str:
    """Return the results as Markdown; the memory of the update where runs have `MemoryAccounting`."""
    memory = {
        (task, cell): study.update_memory(task, cell)
        for task in study.tasks
        for cell in study.cells
    }
    measured = any(memory.values())
    more = " peak of the update |" if measured else ""
    more += "".join(f" rollouts to {level:g} |" for level in study.levels)
    lines = [
        "| task | cell | seeds | pass@1 | on the support | greedy | gain over warm-up | paired difference in pass@1 | "
        "detectable (80 %) | clip fraction | KL | update time |" + more,
        "|---" * (12 + more.count("|")) + "|",
    ]
    for task in study.tasks:
        for cell, options in study.cells.items():
            found = study.summaries(task, cell)
            if not found:
                continue
            base = study.summaries(task, options["against"]) if "against" in options else None
            support = [
                s["final"]["support_pass_at_1"]
                for s in found.values()
                if "support_pass_at_1" in s["final"]
            ]
            final = [s["final"]["pass_at_1"] for s in found.values()]
            gains = [s["final"]["pass_at_1"] - s["warmup"]["pass_at_1"] for s in found.values()]
            greedy = statistics.mean(s["final"]["greedy_accuracy"] for s in found.values())
            differences = _differences(study, task, cell, options.get("against"))
            lines.append(
                f"| {task} | {cell} | {len(found)} | {_show(*interval(final))} | "
                + (f"{statistics.mean(support):.3f} | " if support else "| ")
                + f"{greedy:.3f} | {_show(*interval(gains))} | "
                + (
                    f"{_show(*interval(differences), sign=True)} | {detectable(differences):.3f} | "
                    if differences
                    else "| | "
                )
                + f"{statistics.mean(s['final']['clip_fraction'] for s in found.values()):.4f} | "
                + f"{statistics.mean(s['final']['kl'] for s in found.values()):.4f} | "
                + f"{statistics.mean(s['seconds']['training'] / s['updates'] for s in found.values()):.2f} s |"
                + (f" {_mebibytes(memory[task, cell])} |" if measured else "")
                + "".join(f" {_reach(found, level, base)} |" for level in study.levels)
            )
    return "\n".join(lines)


def _differences(study: Study, task: str, cell: str, against: str | None) -> list[float]:
    if against is None:
        return []
    own, base = study.summaries(task, cell), study.summaries(task, against)
    return [
        s["final"]["pass_at_1"] - base[seed]["final"]["pass_at_1"]
        for seed, s in own.items()
        if seed in base
    ]


def _mebibytes(sizes: list[int]) -> str:
    return f"{statistics.mean(sizes) / 2**20:.0f} MiB" if sizes else ""


def _show(mean: float, half: float, sign: bool = False, digits: int = 3) -> str:
    value = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return value if math.isnan(half) else f"{value} ± {half:.{digits}f}"


def draw(study: Study, path: Path) -> None:
    """Draw held-out pass@1 by task and cell, a line per seed, and below it the paired differences with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(study.cells)
    size = (max(5.5, 0.5 * len(names)) * len(study.tasks), 6)
    figure, panels = pyplot.subplots(
        2, len(study.tasks), figsize=size, layout="constrained", squeeze=False, sharex=True
    )
    for column, task in enumerate(study.tasks):
        scores, gaps = panels[0][column], panels[1][column]
        for seed in study.seeds:
            found = {
                i: s["final"] for i, c in enumerate(names) if (s := study.summary(task, c, seed))
            }
            values = [final["pass_at_1"] for final in found.values()]
            if len(study.seeds) > 1:
                scores.plot(list(found), values, "o-", ms=4, lw=0.7, label=f"seed {seed}")
            else:  # no spread over seeds: show what the number of problems leaves open
                bounds = [
                    [abs(b - f["pass_at_1"]) for b in f["pass_at_1_interval"]]
                    for f in found.values()
                ]
                label = f"seed {seed}, 95 % interval over problems"
                scores.errorbar(
                    list(found),
                    values,
                    list(zip(*bounds, strict=True)),
                    fmt="o",
                    ms=4,
                    capsize=4,
                    label=label,
                )
        for place, cell in enumerate(names):
            differences = _differences(study, task, cell, study.cells[cell].get("against"))
            if differences:
                mean, half = interval(differences)
                gaps.plot(
                    [place] * len(differences), differences, "o", ms=4, color="tab:gray", alpha=0.6
                )
                error = 0 if math.isnan(half) else half
                gaps.errorbar(
                    place + 0.15, mean, yerr=error, fmt="D", ms=5, capsize=4, color="tab:red"
                )
        gaps.axhline(0, color="black", lw=0.8)
        gaps.set_xticks(range(len(names)), names, rotation=30, ha="right")
        scores.set(title=task, ylabel="held-out pass@1 after training")
        gaps.set(ylabel="difference from the base, by seed")
        for axes in (scores, gaps):
            axes.grid(alpha=0.3, axis="y")
        scores.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "study", type=Path, help="a study file, such as benchmarks/studies/mpo.yaml"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a run")
    parser.add_argument("--seeds", type=int, nargs="*", help="of the study's seeds, only these")
    parser.add_argument("--tasks", nargs="*", help="of the study's tasks, only these")
    parser.add_argument("--cells", nargs="*", help="of the study's cells, only these")
    parser.add_argument("--report", action="store_true", help="run nothing; report what is there")
    options = parser.parse_args()
    study = Study.read(options.study)
    study = Study(
        study.runs,
        [seed for seed in study.seeds if options.seeds is None or seed in options.seeds],
        {
            name: task
            for name, task in study.tasks.items()
            if options.tasks is None or name in options.tasks
        },
        {
            name: cell
            for name, cell in study.cells.items()
            if options.cells is None or name in options.cells
        },
        study.levels,
    )
    failed = [] if options.report else run_all(study, options.jobs, options.threads)
    text = table(study)
    print(text)
    study.runs.mkdir(parents=True, exist_ok=True)
    (study.runs / "results.md").write_text(text + "\n")
    draw(study, study.runs / "results.png")
    print(f"wrote {study.runs / 'results.md'} and {study.runs / 'results.png'}")
    if failed:
        sys.exit("failed: " + ", ".join(failed))


if __name__ == "__main__":
    main()
