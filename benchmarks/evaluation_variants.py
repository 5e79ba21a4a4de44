"""Compare two evaluations on problems with and without a variant among the training rows.

python benchmarks/evaluation_variants.py --before before/svamp.jsonl --after after/svamp.jsonl --data FILE

The answers are greedy ones on SVAMP, of `evaluate`. A problem has a variant if it shares 13 words
in a row with a training problem, as in the contamination check of the data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lightning_mpo.data import Svamp
from lightning_mpo.data.contamination import runs
from lightning_mpo.functional.evaluation import mean_interval
from lightning_mpo.rollout.answer_file import read_answers

WORDS = 13


def main() -> None:
    """Print accuracies and paired differences."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    for name in ("--before", "--after"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--data", help="SVAMP.json; default: as in the recipe")
    options = parser.parse_args()
    splits = Svamp(options.data).splits
    training = set().union(*(runs(row.prompt, WORDS) for row in splits.train))
    has_variant = [bool(runs(row.prompt, WORDS) & training) for row in splits.validation]
    # problems of the files are the validation rows, by number
    right = {}
    for name, path in (("before", options.before), ("after", options.after)):
        problems = read_answers(path)[1]
        right[name] = torch.tensor([float(row["samples"][0]["right"]) for row in problems])
    variant = torch.tensor([has_variant[row["problem"]] for row in problems])
    for name, chosen in (("all", variant | True), ("variant", variant), ("no variant", ~variant)):
        before, after = right["before"][chosen], right["after"][chosen]
        figures = [mean_interval(before), mean_interval(after), mean_interval(after - before, -1)]
        cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in figures]
        print(f"| {name} ({int(chosen.sum())}) | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
