"""`lightning-mpo sift`: the problems that no try of an evaluation solved, as rows to train on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mpo.cli.benchmarks import read_benchmark
from lightning_mpo.cli.guard import guarded
from lightning_mpo.data.identity import digest_of
from lightning_mpo.errors import UserError
from lightning_mpo.rollout.answer_file import read_answers
from lightning_mpo.storage import write_text
from lightning_mpo.types import PromptRow, Splits


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo sift`; return the exit code, 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog="lightning-mpo sift",
        description="Write the problems of a file of answers that at most N tries solved, as rows "
        "to train on. The file is of `evaluate --split train --completions K`.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("answers", type=Path, help="file of answers of `evaluate`")
    add("--problems", required=True, metavar="NAME", help="the benchmark that was answered")
    add("--to", type=Path, required=True, metavar="FILE", help="the rows; FILE.manifest.json: how")
    add(
        "--most",
        type=int,
        default=0,
        metavar="N",
        help="right tries of a hard problem (default: 0)",
    )
    return guarded(lambda: _sift(parser.parse_args(arguments)))


def _sift(options: argparse.Namespace) -> None:
    """Write the rows and the manifest, and print the counts."""
    about, problems = read_answers(options.answers)
    tries = about["settings"]["completions"]
    if not 0 <= options.most < tries:
        raise UserError(
            f"`--most` must be from 0 to {tries - 1}, as each problem has {tries} tries, got "
            f"{options.most}"
        )
    if options.to.suffix != ".jsonl":
        raise UserError(f"`--to` must be a file that ends in .jsonl, got {str(options.to)!r}")
    rows = _rows(options.problems, about, options.answers)
    hard = [problem["problem"] for problem in problems if is_hard(problem, options.most)]
    undecided = sum(not is_decided(problem) for problem in problems)
    if not hard:
        raise UserError(
            f"{options.answers} has no problem that at most {options.most} of {tries} tries solved"
        )
    # the manifest comes last
    lines = [json.dumps(row_of(rows[i]), ensure_ascii=False, default=str) + "\n" for i in hard]
    write_text(options.to, "".join(lines))
    manifest: dict[str, Any] = {
        "answers": str(options.answers),
        **{key: about.get(key) for key in ("benchmark", "split", "model", "weights", "step")},
        "settings": about["settings"],  # of sampling, and of the texts around a prompt
        "plain": not about["settings"]["chat_template"],
        "most_right": options.most,
        "problems": len(problems),
        "hard": len(hard),
        "undecided": undecided,
        "rows": digest_of(Splits([rows[i] for i in hard], [])),
    }
    path = options.to.with_name(f"{options.to.stem}.manifest.json")
    write_text(path, json.dumps(manifest, indent=1) + "\n")
    print(
        f"{len(hard)} of {len(problems)} problems are hard: at most {options.most} of {tries} "
        f"tries solved them; {undecided} without a verdict are left out"
    )
    print(f"rows are in {options.to}, how they were chosen in {path}")


def is_decided(problem: dict[str, Any]) -> bool:
    """Return whether an accuracy reward judged each try of a problem."""
    return all(sample["right"] is not None for sample in problem["samples"])


def is_hard(problem: dict[str, Any], most: int) -> bool:
    """Return whether at most `most` tries solved a problem.

    Example:
        >>> is_hard({"samples": [{"right": False}, {"right": True}]}, most=0)
        False
    """
    rights = sum(bool(sample["right"]) for sample in problem["samples"])
    return is_decided(problem) and rights <= most


def _rows(name: str, about: dict[str, Any], path: Path) -> Sequence[PromptRow]:
    """Return the problems that were answered.

    Raises:
        UserError: the benchmark has other problems.
    """
    split = about.get("split", "validation")
    benchmark = read_benchmark(name, about["problems"], False, split)
    benchmark.data.prepare_data()
    if digest_of(Splits([], benchmark.rows)) != about["rows"]:
        raise UserError(
            f"{path} is not of the problems of {benchmark.name!r}: the first {about['problems']} "
            f"rows of its split {split!r} are others"
        )
    return benchmark.rows


def row_of(row: PromptRow) -> dict[str, Any]:
    """Return a row as an object with the columns prompt, target and solution, which `Table` reads.

    Its other columns stay, unless they have one of these names.
    """
    content: dict[str, Any] = {"prompt": row.prompt, "target": row.target}
    if row.messages:
        content["prompt"] = [dict(message) for message in row.messages]
    if row.solution is not None:
        content["solution"] = row.solution
    return {**{key: value for key, value in row.extra.items() if key not in content}, **content}
