"""`lightning-mpo annotate`: thoughts of a model in Python files, and files without them again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_mpo.cli.export import Reader, read_run
from lightning_mpo.cli.guard import guarded
from lightning_mpo.data.annotations import (
    Annotated,
    annotate_folder,
    check_empty,
    strip_folder,
)
from lightning_mpo.data.code_files import CodeFile
from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.rewards.next_line import NextLineLikelihood
from lightning_mpo.rewards.scoring import completions_of
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.seeding import Stream, generator_of


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo annotate`; return the exit code, 2 after a mistake."""

    def action() -> None:
        options, cli = read(arguments)
        if cli is None:
            print(f"stripped   {_describe(strip_folder(options.strip, options.to))}, {options.to}")
        else:
            print(f"annotated  {_describe(_annotate(options, cli))}, {options.to}")

    return guarded(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-mpo annotate",
        description="Write thoughts of a model, comment lines, into the files of its data "
        "(`data.paths`), or take them out again byte for byte. The lines are listed in "
        "thoughts.json in the new folder.",
        epilog="Options of the configuration go on the command line as for the other verbs, such "
        "as --data.paths '[src]'.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", metavar="NAME", help="of the E-step")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="the trained policy")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where the files are written")
    parser.add_argument("--strip", type=Path, metavar="FOLDER", help="an annotated folder")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="most lines at once")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--greedy", action="store_true", help="take the most probable tokens")
    return parser


def _describe(done: Annotated) -> str:
    skipped = "" if done.skipped == "none" else f" (copied as they are: {done.skipped})"
    return f"{done.files:,} files{skipped}, {done.thoughts:,} thoughts"


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, Reader | None]:
    """Return the options of a command line and the parts of its run; none with `--strip`.

    Raises:
        UserError: an option is missing or wrong, or the configuration is not that of an E-step.
    """
    options, rest = _parser().parse_known_args(arguments)
    if options.to is None:
        raise UserError("`annotate` needs --to FOLDER, which is empty or new")
    if options.strip is not None:
        if rest or options.config or options.checkpoint:
            raise UserError("`annotate --strip FOLDER` takes --to alone, and no model")
        return options, None
    if not options.config or options.checkpoint is None:
        raise UserError(
            "`annotate` needs -c CONFIG and --checkpoint FILE of an E-step, or --strip FOLDER"
        )
    if options.batch < 1:
        raise UserError(f"`--batch` must be at least 1, got {options.batch}")
    cli, policy = read_run("annotate", options.config, options.checkpoint, rest, reference=True)
    if not isinstance(cli.model, PolicyOptimization) or not isinstance(cli.datamodule, CodeLines):
        raise UserError(
            "`annotate` needs the configuration of an E-step: data `CodeLines`, and an algorithm "
            "such as `ra3_e_step`"
        )
    loop = cli.config_init[cli.subcommand].get("rollout")
    loop.check(policy, cli.model.objective, cli.datamodule, "predict")
    return options, cli


def _annotate(options: argparse.Namespace, cli: Reader) -> Annotated:
    """Sample thoughts for all lines of the files and write them."""
    check_empty(options.to)
    # the parts of the run
    module, policy, data = cli.model, cli.model.policy, cli.datamodule
    loop = cli.config_init[cli.subcommand].get("rollout")
    policy.check()
    data.connect(policy.tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.build(device=device, reference=module.objective.support.from_reference)
    # thoughts that the reward would not use are not written
    rewards = [reward for reward in loop.rewards if isinstance(reward, NextLineLikelihood)]
    reward = rewards[0] if rewards else NextLineLikelihood()
    request = SamplingRequest(
        module.objective.support,
        module.temperature,
        loop.max_new_tokens,
        options.greedy,
        stop=loop.stop_ids(policy),
    )
    number = 0

    def think(file: CodeFile) -> dict[int, str]:
        nonlocal number
        groups, thoughts, number = data.rows_by_start(file), dict[int, str](), number + 1
        # one row of random numbers after the other, whatever the batches
        generator = generator_of(options.seed, Stream.ANNOTATE, number)
        batches = [
            rows[start : start + options.batch]
            for rows in groups
            for start in range(0, len(rows), options.batch)
        ]
        for rows in batches:
            rollout: Any = loop.sampler.sample(
                policy, data.encode(rows), 1, request, generator=generator
            )
            for completion in completions_of(rollout):
                if (text := reward.thought_of(completion)) is not None:
                    thoughts[completion.row["number"] - 1] = text
        print(f"{file.name}: {len(thoughts):,} thoughts", flush=True)
        return thoughts

    return annotate_folder(data.paths, options.to, think, data.max_files)
