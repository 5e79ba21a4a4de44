"""`lightning-mpo compare`: the paired difference of two files of answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_mpo.cli.guard import guarded
from lightning_mpo.modules.rollout_setup import check_ks
from lightning_mpo.rollout.answer_file import check_comparable, read_answers
from lightning_mpo.rollout.evaluation import by_group
from lightning_mpo.rollout.stages_table import print_difference


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo compare`; return the exit code, 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog="lightning-mpo compare",
        description="Print both evaluations of the same problems and their paired difference, "
        "second - first, with 95 % intervals.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("first", type=Path, help="file of answers of `evaluate`, `validate`, `test` or a run")
    add("second", type=Path, help="another one, of the same problems and settings")
    add("--k", nargs="+", type=int, metavar="K", help="of pass@k and maj@k (default: 1)")
    add("--by", nargs="+", metavar="COLUMN", help="differences by these columns, too")
    add("--other-model", action="store_true", help="allow models of different architectures")
    return guarded(lambda: _compare(parser.parse_args(arguments)))


def _compare(options: argparse.Namespace) -> None:
    """Print the tables."""
    (first, before), (second, after) = map(read_answers, (options.first, options.second))
    check_comparable(second, first, options.first, options.other_model)
    ks = options.k or [1]
    completions = second["settings"]["completions"]
    check_ks("--k", ks, completions)
    print_difference(second["benchmark"], after, before, ks)
    groups = [by_group(part, options.by or []) for part in (before, after)]
    for column, by_value in groups[1].items():
        for value, part in by_value.items():
            print_difference(f"{column} {value}", part, groups[0][column][value], ks)
