"""How probable a policy finds a comment in place of a held-out line, and the line itself.

    python benchmarks/ra3/expected_comments.py -c ra3_e_step_stage --checkpoint plain=none \\
        --checkpoint think=runs/ra3/round_1/think/last.ckpt --dtype bfloat16 --out runs/ra3_expected

P(comment | s) is the probability that the token behind the indentation of a line begins with `#`,
over the whole vocabulary. A comment in front of a line takes it away, as two rarely follow each other.
Its worth is -log(1 - P) / |a|, nats per token of the line; L(a | s) is in the same unit. Under a
reference with a large worth any comment seems to help. Intervals are 95 %, with the file as the unit.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import named, parsed, parser, read
from tables import interval

from lightning_mpo.data.code_files import share_of
from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.rewards.next_line import MARK
from lightning_mpo.types import PromptRow

sys.path.append(str(Path(__file__).parents[1] / "mpo"))
from common import add_threads, at_least, print_table, run, write_csv

COLUMNS = ("comment", "worth", "likelihood")


def main(argv: Sequence[str] | None = None) -> None:
    options, rest = parse(argv)
    torch.set_num_threads(options.threads)
    checkpoints = named(options.checkpoint)
    policies, data = read(
        "expected_comments.py", options, checkpoints, rest, CodeLines, "ra3_e_step_stage"
    )
    tokenizer = next(iter(policies.values())).tokenizer
    data.connect(tokenizer)
    rows = sorted(data.splits.validation, key=lambda row: share_of(row.where, 0))
    table = []
    for name in checkpoints:
        policy = policies.pop(name)  # one model at a time is in memory
        policy.build(device=torch.device("cpu"), reference=False)
        marks = comment_ids(policy)
        encoded = data.encode(rows[: options.lines]).rows
        measured = [expected(policy, row, marks) for row in encoded]
        row = {"policy": name, "number of lines": len(measured)}
        for column in COLUMNS:
            row |= interval(column, ((one["file"], one[column], 1) for one in measured))
        table.append(row)
    print_table(table)
    write_csv(table, options.out, "expected")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    made = parser(__doc__, "E-step: its policy and data", Path("runs/ra3_expected"))
    made.add_argument(
        "--lines", type=at_least(1), default=80, help="held-out lines, chosen by a hash"
    )
    add_threads(made)
    return parsed(made, argv)


def comment_ids(policy: CausalPolicy) -> list[int]:
    """Return the ids of tokens that begin with `#`, blanks in front of it left out."""
    return [i for i, text in enumerate(policy.token_texts) if text.lstrip(" ").startswith(MARK)]


def expected(policy: CausalPolicy, row: PromptRow, marks: Sequence[int]) -> dict[str, Any]:
    """Return P(comment | s), its worth and L(a | s) of one line.

    Args:
        policy: built.
        row: as `CodeLines.encode` returns it.
        marks: ids of tokens with which a comment begins.

    Returns:
        `comment`: a probability; `worth` and `likelihood`: nats per token of the line.
    """
    ids = {name: list(row.extra[f"{name}_ids"]) for name in ("before", "blank", "line")}
    context, line = [*ids["before"], *ids["blank"]], ids["line"]
    with rollout_mode(policy):
        logits_LV = policy.network(torch.tensor([[*context, *line]])).logits[0]
    # row t predicts token t + 1
    logprobs_TV = logits_LV[len(context) - 1 : -1].double().log_softmax(-1)
    comment = float(logprobs_TV[0, list(marks)].exp().sum())
    likelihood = float(logprobs_TV.gather(1, torch.tensor(line)[:, None]).mean())
    worth = -math.log1p(-comment) / len(line)
    return {
        "file": row.extra["file"],
        "comment": comment,
        "worth": worth,
        "likelihood": likelihood,
    }


if __name__ == "__main__":
    run(main)
