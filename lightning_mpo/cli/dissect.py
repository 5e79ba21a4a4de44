"""`lightning-mpo dissect`: does a plan, knowledge or a division into subproblems help a policy?"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_mpo.cli import evaluate
from lightning_mpo.cli.guard import guarded
from lightning_mpo.data.annotated import Annotated, annotate_gsm8k, read_annotated, rows_of
from lightning_mpo.data.gsm8k import Gsm8k
from lightning_mpo.errors import UserError
from lightning_mpo.functional.chains import all_solved
from lightning_mpo.functional.evaluation import mean_interval, paired_difference
from lightning_mpo.rollout.answer_file import read_answers
from lightning_mpo.storage import write_text

ANALYSES = ("plan", "knowledge", "chain")
SUFFIX = "\n\nSolve it step by step. Write the final number after ####."
STEP_SUFFIX = " Write its answer after #### and stop."
FIXED = ("--benchmarks", "--split", "--by", "--against", "--harness")
"""Options of `evaluate` that have no meaning here."""
EXAMPLE = "lightning-mpo dissect FILE.jsonl --model FOLDER"


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo dissect`; return the exit code, 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog="lightning-mpo dissect",
        description="Answer annotated problems with and without their plan, with and without "
        "knowledge, and as chains of subproblems. Other options are those of `evaluate`.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "file", nargs="?", metavar="FILE", help="annotated problems; docs/sparkle.md has the schema"
    )
    add("--limit", type=int, metavar="N", help="the first N problems (default: all)")
    add("--analyses", nargs="+", choices=ANALYSES, default=list(ANALYSES), metavar="NAME")
    add("--suffix", default=SUFFIX, help="text after each prompt, but for a chain's")
    add("--step_suffix", default=STEP_SUFFIX, help="text after each step of a chain")
    add("--out", type=Path, default=Path("dissection"), metavar="DIR", help="folder of the answers")
    add("--annotate", choices=("gsm8k",), help="write FILE from the calculations of a data set")
    add("--path", metavar="DIR", help="of --annotate: folder of the data set")
    add("--to", type=Path, metavar="FILE", help="of --annotate: the file to write")
    outcome: list[int] = []
    failed = guarded(lambda: outcome.append(_run(*parser.parse_known_args(arguments))))
    return failed or outcome[0]


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    """Annotate, or answer and report; return the exit code."""
    if options.annotate:
        if options.to is None or options.file or rest:
            raise UserError("`dissect --annotate gsm8k` takes --to FILE, and --path DIR, alone")
        _annotate(options.path, options.to)
        return 0
    if not options.file:
        raise UserError(f"`dissect` needs a file of annotated problems: {EXAMPLE}")
    names = [word.partition("=")[0] for word in rest]
    for name in names:
        if name in FIXED:
            raise UserError(f"`dissect` makes its own benchmarks: leave out `{name}`")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"`--limit` must be at least 1, got {options.limit}")
    # a part of the problems, each with its whole chain
    problems = read_annotated(options.file)[: options.limit]
    if not {"--model", "--checkpoint"} & set(names):
        raise UserError(f"`dissect` needs --model or --checkpoint, as `evaluate` does: {EXAMPLE}")
    files = _write_benchmarks(problems, options)
    # `evaluate` loads the model once, answers all files and goes on after a stop
    failed = evaluate.main([*rest, "--benchmarks", *files, "--out", str(options.out)])
    if failed:
        return failed
    answers = {
        Path(name).stem: read_answers(options.out / f"{Path(name).stem}.jsonl")[1] for name in files
    }
    summary = dissect(problems, answers, options.analyses)
    _print(summary)
    path = options.out / "dissection.json"
    write_text(path, json.dumps(summary, indent=1) + "\n")
    print(f"the figures are in {path}")
    return 0


def _annotate(path: str | None, to: Path) -> None:
    """Write annotations of GSM8K's validation problems."""
    data = Gsm8k(path, calculator=True)
    data.prepare_data()
    records, without = annotate_gsm8k(data.splits.validation)
    if not records:
        raise UserError("no solution of the data set has a calculation such as <<48/2=24>>")
    write_text(to, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records))
    print(f"{len(records)} problems are in {to}; {without} without a calculation are left out")


def _write_benchmarks(problems: Sequence[Annotated], options: argparse.Namespace) -> list[str]:
    """Write the prompts of each analysis as a benchmark for `evaluate`; return their files."""
    folder, names = options.out / "problems", []
    folder.mkdir(parents=True, exist_ok=True)
    for analysis in ("plain", *dict.fromkeys(options.analyses)):
        rows = rows_of(problems, analysis)
        lacking = sum(analysis not in problem.prompts() for problem in problems)
        if lacking:
            print(f"{analysis:10} {lacking} of {len(problems)} problems have no such annotation")
        if not rows:
            continue
        table = folder / f"{analysis}.jsonl"
        suffix = options.step_suffix if analysis == "chain" else options.suffix
        write_text(table, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        data = {"path": str(table), "target": "target", "suffix": suffix}
        content = {
            "data": {"class_path": "PromptFile", "init_args": data},
            "rollout": {"rewards": ["MathAnswer"]},
        }
        names.append(str(folder / f"{analysis}.yaml"))
        write_text(Path(names[-1]), yaml.safe_dump(content))
    return names


def dissect(
    problems: Sequence[Annotated],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    analyses: Sequence[str] = ANALYSES,
) -> dict[str, Any]:
    """Return the figures of the analyses, each as mean, lower and upper end.

    Args:
        problems: the annotated problems.
        answers: by analysis, the problems of a file of answers.
        analyses: the analyses to make; one without an annotation is left out.
    """
    plain_P = _rates(answers["plain"], len(problems))
    summary: dict[str, Any] = {"plain": _figure(mean_interval, plain_P)}
    for analysis in analyses:
        has_P = torch.tensor([analysis in problem.prompts() for problem in problems])
        if not bool(has_P.any()):
            continue
        if analysis == "chain":
            rates_S, number_S, step_S = _by_step(answers["chain"])
            helped_P = all_solved(rates_S, number_S, len(problems))
            steps = {
                str(step): _figure(mean_interval, rates_S[step_S == step])
                for step in step_S.unique().tolist()
            }
            summary["steps"] = steps
        else:
            # an empty annotation changes no prompt, so its answers are those without it
            helped_P = _rates(answers.get(analysis, ()), len(problems))
            empty_P = torch.tensor(
                [
                    problem.prompts().get(analysis) == problem.prompts()["plain"]
                    for problem in problems
                ]
            )
            helped_P = torch.where(empty_P, plain_P, helped_P)
        summary[analysis] = _compared(plain_P, helped_P, has_P)
        levels = [str(problem.difficulty) for problem in problems]
        if any(problem.difficulty is not None for problem in problems):
            summary[analysis]["by_difficulty"] = {
                level: _compared(
                    plain_P, helped_P, has_P & torch.tensor([x == level for x in levels])
                )
                for level in sorted(set(levels), key=lambda text: (len(text), text))
            }
    return summary


def _compared(plain_P: Tensor, helped_P: Tensor, chosen_P: Tensor) -> dict[str, Any]:
    """Return both accuracies of the chosen problems that are judged in both, and the gain."""
    both_P = chosen_P & ~plain_P.isnan() & ~helped_P.isnan()
    pair = plain_P[both_P], helped_P[both_P]
    return {
        "problems": int(both_P.sum()),
        "not_judged": int((chosen_P & ~both_P).sum()),
        "without": _figure(mean_interval, pair[0]),
        "with": _figure(mean_interval, pair[1]),
        "gain": _figure(paired_difference, *pair),
    }


def _figure(function: Any, *values: Tensor) -> list[float | None]:
    """Return mean, lower and upper end of values that are not NaN; None: there is none."""
    if len(values) == 1:
        values = (values[0][~values[0].isnan()],)
    return [None if math.isnan(x) else x for x in function(*values).tolist()]


def _by_step(answers: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return rate, number of the problem and step of each answered prompt; NaN: not judged."""
    rates, places = [], []
    for answer in answers:
        rights = [sample["right"] for sample in answer["samples"]]
        rates.append(math.nan if None in rights else sum(rights) / len(rights))
        places.append((answer["columns"]["number"], answer["columns"]["step"]))
    number_S, step_S = torch.tensor(places, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return torch.tensor(rates, dtype=torch.float64), number_S, step_S


def _rates(answers: Sequence[Mapping[str, Any]], problems: int) -> Tensor:
    """Return the share of right tries of each problem; NaN: not answered or not judged."""
    rates_S, number_S, _ = _by_step(answers)
    rates_P = torch.full((problems,), torch.nan, dtype=torch.float64)
    rates_P[number_S] = rates_S
    return rates_P


def _print(summary: Mapping[str, Any]) -> None:
    """Print a line for each analysis and difficulty."""
    from rich import get_console
    from rich.table import Table

    table = Table("analysis", "difficulty", "problems", "without", "with", "gain")
    for name in ANALYSES:
        if name not in summary:
            continue
        parts = {"all": summary[name], **summary[name].get("by_difficulty", {})}
        for level, part in parts.items():
            figures = [_shown(part[key]) for key in ("without", "with", "gain")]
            title = "chain (all steps right: SSR)" if name == "chain" else name
            table.add_row(title if level == "all" else "", level, str(part["problems"]), *figures)
    get_console().print(table)
    for step, figure in summary.get("steps", {}).items():
        print(f"step {step:3} of a chain, earlier answers given: {_shown(figure)}")


def _shown(figure: Sequence[float | None]) -> str:
    """Return mean and interval as text; empty: there is no value."""
    if figure[0] is None:
        return ""
    return f"{figure[0]:.3f} [{figure[1]:.3f}, {figure[2]:.3f}]"
