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
from held_out import named
from tables import interval

from lightning_mpo.cli.export import read_run
from lightning_mpo.data.code_files import share_of
from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.errors import UserError
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
    table = []
    for name, checkpoint in named(options.checkpoint).items():
        cli, policy = read_run("expected_comments.py", options.config, checkpoint, rest)
        data: Any = cli.datamodule
        if not isinstance(data, CodeLines) or not isinstance(policy, CausalPolicy):
            raise UserError(
                "-c needs a `CausalPolicy` and the data `CodeLines`, as `ra3_e_step` has"
            )
        policy.check()
        if options.dtype:  # behind the checks, which refuse to train 16 bits
            policy.dtype = getattr(torch, options.dtype)
        data.connect(policy.tokenizer)
        rows = sorted(data.splits.validation, key=lambda row: share_of(row.where, 0))
        policy.build(device=torch.device("cpu"), reference=False)
        measured = [expected(policy, row) for row in data.encode(rows[: options.lines]).rows]
        row = {"policy": name, "number of lines": len(measured)}
        for column in COLUMNS:
            row |= interval(column, ((one["file"], one[column], 1) for one in measured))
        table.append(row)
    print_table(table)
    write_csv(table, options.out, "expected")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Options of the configuration go on the command line, too.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("-c", "--config", action="append", required=True, help="E-step: its policy and data")
    add("--checkpoint", action="append", required=True, metavar="NAME=FILE", help="or NAME=none")
    add("--lines", type=at_least(1), default=80, help="held-out lines, chosen by a hash")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: that of -c)")
    add("--out", type=Path, default=Path("runs/ra3_expected"), help="folder of the results")
    add_threads(made)
    return made.parse_known_args(argv)


def expected(policy: CausalPolicy, row: PromptRow) -> dict[str, Any]:
    """Return P(comment | s), its worth and L(a | s) of one line.

    Args:
        policy: built.
        row: as `CodeLines.encode` returns it.
    """
    ids = {name: list(row.extra[f"{name}_ids"]) for name in ("before", "blank", "line")}
    context, line = [*ids["before"], *ids["blank"]], ids["line"]
    marks = [i for i, text in enumerate(policy.token_texts) if text.lstrip(" ").startswith(MARK)]
    with rollout_mode(policy):
        logits_LV = policy.network(torch.tensor([[*context, *line]])).logits[0]
    # row t predicts token t + 1
    logprobs_TV = logits_LV[len(context) - 1 : -1].double().log_softmax(-1)
    comment = float(logprobs_TV[0, marks].exp().sum())
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
