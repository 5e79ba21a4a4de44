"""Shares of groups with a signal by level of help: for how many problems are some tries right and some wrong?

    python benchmarks/sparkle_levels.py gsm8k --problems 60 --completions 4 --model FOLDER
    python benchmarks/sparkle_levels.py scaffolds --problems 500 --completions 8 -c scaffolds --checkpoint FILE

The first argument is a recipe of data with solutions, or one whose data are `Scaffolded`. The other options are those of
`evaluate`, so a command that was ended goes on where it stopped. Answers are to training rows, as only these have
scaffolds. Writes the answers and `levels.csv` into `--out`. Intervals are 95 %, with the problem as the unit.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_mpo.checks import at_least
from lightning_mpo.cli import evaluate
from lightning_mpo.cli.benchmarks import read_benchmark
from lightning_mpo.cli.guard import guarded
from lightning_mpo.errors import UserError
from lightning_mpo.functional.evaluation import mean_interval, paired_difference
from lightning_mpo.recipes import find, read
from lightning_mpo.rollout.answer_file import read_answers
from lightning_mpo.storage import write_text

COLUMN = "level"
COLUMNS = ("level", "problems", "pass@1", "signal", "all right", "signal minus level 0")


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the problems at all levels, and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("data", help="a recipe of data with solutions, or a file whose data are `Scaffolded`")
    add("--problems", type=int, default=60, help="number of problems, the first ones (default: 60)")
    add("--chunks", type=int, default=4, help="of a solution (default: 4)")
    add("--whole", action="store_true", help="also the level that shows the whole solution")
    add("--completions", type=int, default=4, help="tries of a problem at a level (default: 4)")
    add("--plain", action="store_true", help="prompts are text: no chat template is applied")
    add("--out", type=Path, default=Path("levels"), help="folder of the answers (default: levels)")
    outcome: list[int] = []
    failed = guarded(lambda: outcome.append(_run(*parser.parse_known_args(arguments))))
    return failed or outcome[0]


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    """Answer the problems and print the table; return the exit code."""
    at_least("sparkle_levels", 1, problems=options.problems)
    at_least("sparkle_levels", 2, completions=options.completions)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "scaffolded.yaml"
    write_text(path, yaml.safe_dump(scaffolded(options)))
    limit = rows_of(path, options)
    shared = ["--completions", str(options.completions), "--out", str(options.out)]
    problems = ["--benchmarks", str(path), "--split", "train", "--limit", str(limit)]
    failed = evaluate.main([*rest, *problems, *shared])
    if failed:
        return failed
    table = measure(read_answers(options.out / "scaffolded.jsonl")[1])
    print_table(table)
    with open(options.out / "levels.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *table])
    return 0


def scaffolded(options: argparse.Namespace) -> dict[str, Any]:
    """Return a benchmark for `evaluate` whose training rows are the problems at all levels.

    Raises:
        UserError: there is no such recipe, or it has no data or rewards.
    """
    content = read(find(options.data))
    data, rewards = content.get("data"), (content.get("rollout") or {}).get("rewards")
    if not data or not rewards:
        raise UserError(f"{options.data!r} has no `data` or no `rollout.rewards` of its own")
    if str(data["class_path"]).rpartition(".")[2] == "Scaffolded":
        arguments = {**data.get("init_args", {}), "whole": options.whole}
        arguments = {name: value for name, value in arguments.items() if name != "seed"}
    else:
        arguments = {"base": data, "chunks": options.chunks, "whole": options.whole}
    if options.plain:  # an option of the base: `Scaffolded` takes it over
        base = arguments["base"]
        texts = {**base.get("init_args", {}), "chat_template": False}
        arguments["base"] = {**base, "init_args": texts}
    made = {"class_path": "Scaffolded", "init_args": {**arguments, "column": COLUMN}}
    return {"data": made, "rollout": {"rewards": rewards}}


def rows_of(path: Path, options: argparse.Namespace) -> int:
    """Return the number of rows that hold the first problems at all their levels.

    Raises:
        UserError: there are fewer problems.
    """
    benchmark = read_benchmark(str(path), None, False, "train")
    benchmark.data.prepare_data()
    starts = [i for i, row in enumerate(benchmark.rows) if row.extra[COLUMN] == 0]
    if len(starts) < options.problems:
        raise UserError(
            f"`--problems` must be at most {len(starts)}, the number of training problems of "
            f"{options.data!r}, got {options.problems}"
        )
    return [*starts, len(benchmark.rows)][options.problems]


def measure(answers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row of the table for each level. A problem without a verdict is left out.

    A group has a signal if some of its tries are right and some are wrong.

    Args:
        answers: problems of a file of answers, each problem's levels in order from 0.
    """
    rates: dict[int, dict[int, float]] = {}
    number = -1
    for answer in answers:
        level = answer["columns"][COLUMN]
        number += level == 0
        rights = [sample["right"] for sample in answer["samples"]]
        if None not in rights:
            rates.setdefault(level, {})[number] = sum(rights) / len(rights)
    plain = rates.get(0, {})
    table = []
    for level, by_number in sorted(rates.items()):
        rates_P = torch.tensor(list(by_number.values()), dtype=torch.float64)
        both = [number for number in by_number if number in plain]
        first_P, second_P = (has_signal([part[i] for i in both]) for part in (plain, by_number))
        figures = [
            mean_interval(rates_P),
            mean_interval(has_signal(by_number.values())),
            mean_interval((rates_P == 1).double()),
            paired_difference(first_P, second_P),
        ]
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*figure.tolist()) for figure in figures]
        table.append([str(level), str(len(rates_P)), *cells])
    table[0][-1] = ""  # level 0 against itself
    return table


def has_signal(rates: Any) -> Tensor:
    """Return 1 for each share of right tries that is neither 0 nor 1, else 0."""
    return torch.tensor([float(0 < rate < 1) for rate in rates], dtype=torch.float64)


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Print the table in Markdown."""
    for row in (COLUMNS, ["---"] * len(COLUMNS), *table):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    sys.exit(main())
