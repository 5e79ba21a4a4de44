"""Finished runs as lines of `results.jsonl`, a file that is committed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparing.reading import read_json
from lightning_mpo.errors import UserError

KEYS = ("stage", "task", "cell", "seed", "learning_rate")
CODE = (
    "lightning_mpo",
    "callbacks",
    "configs",
    "benchmarks/studies",
    ":!benchmarks/studies/results",
)
"""Paths of the code. If they have uncommitted changes, results have a `+` behind the commit."""


@dataclass(frozen=True)
class Run:
    """A run of a study, identified by stage, task, cell, seed and learning rate."""

    stage: str
    task: str
    cell: str
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """The name of the run in messages, and of its folder."""
        return f"{self.stage}/{self.task}/{self.cell}/lr{self.learning_rate:g}-seed{self.seed}"


class Results:
    """`results.jsonl`: one line for each finished run.

    Args:
        folder: the folder of the file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        self.lines: dict[Run, dict[str, Any]] = {}
        text = self.path.read_text() if self.path.is_file() else ""
        # a process that was killed may have left a part of a line
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            self.path.write_text(complete)
        for number, line in enumerate(complete.splitlines(), 1):
            place, advice = f"line {number} of {self.path}", "delete it to repeat its run"
            content = read_json(line, place, advice)
            if not _is_finished(content):
                raise UserError(f"{place} is not a finished run; {advice}")
            self._take(content)

    def add(self, run: Run, content: dict[str, Any]) -> None:
        """Append the line of a finished run to the file, in one write."""
        line = {key: getattr(run, key) for key in KEYS} | _rounded(content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, (json.dumps(line, separators=(",", ":")) + "\n").encode())
            os.fsync(file)
        finally:
            os.close(file)
        self._take(line)

    def of(self, stage: str, task: str, cell: str) -> dict[Run, dict[str, Any]]:
        """Return the lines of a cell on a task, by run."""
        return {
            run: line
            for run, line in self.lines.items()
            if (run.stage, run.task, run.cell) == (stage, task, cell)
        }

    def _take(self, line: dict[str, Any]) -> None:
        self.lines[Run(**{key: line[key] for key in KEYS})] = line


def _is_finished(line: Any) -> bool:
    """Return whether a line has the keys of a finished run, and metrics before, during and after."""
    if not isinstance(line, dict) or not line.keys() >= {*KEYS, "start", "final", "curve"}:
        return False
    ends = (line["start"], line["final"])
    return all(isinstance(values, dict) for values in (*ends, *line["curve"]))


def summarise(summary: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the content of a line.

    Args:
        summary: the `summary.json` of the run.
        seconds: duration of its process.
    """
    # validations by the number of rollouts before them, and the rewards of rollouts
    rollouts, validations, training = 0, [], []
    names = {
        "validation": "pass_at_1",
        "validation_reward": "reward",
        "support_validation": "support_pass_at_1",
        "support_validation_reward": "support_reward",
    }
    for point in summary["curve"]:
        if "length" in point:
            rollouts += 1
            training.append(point["reward"])
        else:
            values = {new: point[old] for old, new in names.items() if old in point}
            validations.append({"rollouts": rollouts} | values)
    # the evaluation before the first update stands first
    start = next(iter(summary.values()))
    # seconds without the validations
    spent = summary["seconds"]
    update = (spent["training"] - spent.get("validation", 0.0)) / max(summary["updates"], 1)
    return {
        "commit": commit(),
        "cpu": cpu_name(),
        "updates": summary["updates"],
        "seconds": seconds,
        "seconds_per_update": update,
        "start": {k: v for k, v in start.items() if not k.endswith("_interval")},
        "final": {k: v for k, v in summary["final"].items() if not k.endswith("_interval")},
        "curve": validations,
        "training_reward": training,
    }


def commit() -> str:
    """Return the commit of the code, with a `+` if `CODE` has uncommitted changes."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )

    head = git("rev-parse", "--short=12", "HEAD").stdout.strip() or "unknown"
    return head + "+" * bool(git("status", "--porcelain", "--", *CODE).stdout.strip())


def cpu_name() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _rounded(value: Any) -> Any:
    """Return a value with its floats rounded to 6 digits."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
