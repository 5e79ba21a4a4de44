"""`lightning-mpo shift`: which contexts training won and lost, under one judge or two."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lightning_mpo.checks import finite
from lightning_mpo.cli import evaluate
from lightning_mpo.cli.guard import guarded
from lightning_mpo.errors import UserError
from lightning_mpo.functional.support_shift import ratio_gap
from lightning_mpo.metrics.support_shift import Judge, support_shift
from lightning_mpo.rollout.answer_file import Problems, check_comparable, read_answers
from lightning_mpo.rollout.shift_figure import draw_shift
from lightning_mpo.storage import write_text

EXAMPLE = "lightning-mpo shift before/peptides.jsonl after/peptides.jsonl"


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo shift`; return the exit code, 2 after a mistake."""
    parser = _parser()
    files: list[Path] = []

    def action() -> None:
        options, rest = parser.parse_known_args(arguments)
        files.extend(_files(options, rest))
        if not files:  # an evaluation has ended with a mistake, and its line is printed
            return
        _shift(options, *files)

    return guarded(action) or (0 if files else 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-mpo shift",
        description="Print which contexts the base policy solves, the trained one, both or "
        "neither, with 95 % intervals over contexts.",
        epilog="Checkpoints are evaluated first; further options are those of `evaluate`.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("base", type=Path, help="file of answers of the base policy, or a checkpoint")
    add("trained", type=Path, help="file of answers of the trained policy, or a checkpoint")
    add("--reward", metavar="NAME", help="reward of a solution (default: right answers)")
    add("--threshold", type=float, metavar="X", help="least score of a solution")
    add("--independent", metavar="NAME", help="an evaluator that did not train the policy")
    add("--independent-threshold", type=float, metavar="X", help="least score of its solution")
    add("--k", type=int, metavar="K", help="samples of a context (default: all)")
    add("--benchmark", metavar="NAME", help="problems of checkpoints: a recipe of data, or a file")
    add("--out", type=Path, default=Path("shift"), metavar="DIR", help="folder of the results")
    return parser


def _files(options: argparse.Namespace, rest: Sequence[str]) -> list[Path]:
    """Return both files of answers; checkpoints are evaluated. Empty: an evaluation failed."""
    _judges(options)  # mistakes end the verb before an evaluation
    files = []
    for name in ("base", "trained"):
        path: Path = getattr(options, name)
        if path.suffix == ".jsonl":
            if rest and name == "trained" and not options.benchmark:
                raise UserError(f"`shift` has no option `{rest[0]}` for files of answers")
            files.append(path)
            continue
        if not options.benchmark:
            raise UserError(
                f"`shift` needs --benchmark for the checkpoint {str(path)!r}; two files of answers "
                f"need no evaluation: {EXAMPLE}"
            )
        folder = options.out / name
        words = ["--checkpoint", str(path), "--benchmarks", options.benchmark, "--out", str(folder)]
        if evaluate.main([*words, *rest]):
            return []
        files.append(folder / f"{Path(options.benchmark).stem}.jsonl")
    return files


def _judges(options: argparse.Namespace) -> list[Judge]:
    """Return the judge of training, and the independent one if it is given."""
    judges = []
    for name, option in (("reward", "threshold"), ("independent", "independent_threshold")):
        reward, threshold = getattr(options, name), getattr(options, option)
        flag = option.replace("_", "-")
        if (reward is None) != (threshold is None):
            raise UserError(f"`--{name}` and `--{flag}` belong together: give both or neither")
        finite("shift", **{flag: threshold})
        if reward is not None:
            judges.append(Judge(reward, threshold))
        elif name == "reward":
            judges.append(Judge())
    return judges


def _shift(options: argparse.Namespace, base: Path, trained: Path) -> None:
    """Print the table, and write it with its figure."""
    (first, before), (second, after) = map(read_answers, (base, trained))
    check_comparable(second, first, base)
    completions = first["settings"]["completions"]
    k = completions if options.k is None else options.k
    if not 1 <= k <= completions:
        raise UserError(f"`--k` must be from 1 to {completions}, the completions, got {k}")
    tables = {
        str(judge): support_shift(judge.scores(before), judge.scores(after), judge.threshold, k)
        for judge in _judges(options)
    }
    print_shift(tables, before, k)
    options.out.mkdir(parents=True, exist_ok=True)
    summary = {"base": str(base), "trained": str(trained), "k": k, "judges": tables}
    write_text(options.out / "shift.json", json.dumps(summary, indent=1) + "\n")
    draw_shift(tables, options.out / "shift.png")
    print(f"shift.json and shift.png are in {options.out}")


def print_shift(tables: dict[str, dict[str, list[float]]], problems: Problems, k: int) -> None:
    """Print a column for each judge, and the difference of their ESR.

    Args:
        tables: results by judge, that of training first.
        problems: answers to all contexts.
        k: samples of a context.
    """
    from rich import get_console
    from rich.table import Table

    title = f"support shift, {len(problems)} contexts, k = {k}, 95 % intervals over contexts"
    table = Table("", *tables, title=title, title_justify="left")
    for name in next(iter(tables.values())):
        cells = ["{:.3f}  [{:.3f}, {:.3f}]".format(*results[name]) for results in tables.values()]
        shown = name.replace("_any", f": any of {k}").replace("_pass", f": pass@{k}")
        table.add_row("ESR" if name == "esr" else shown.replace("_", " "), *cells)
    get_console().print(table)
    if len(tables) == 2:
        training, independent = (results["esr"][0] for results in tables.values())
        print(f"delta-ESR  {ratio_gap(training, independent):.3f}: training - independent")
