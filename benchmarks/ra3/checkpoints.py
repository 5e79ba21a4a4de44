"""Policies that a command line names: `--checkpoint NAME=FILE`, and `NAME=none` without training."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning_mpo.cli.export import read_run
from lightning_mpo.data.code_prompts import CodePrompts
from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy

UNTRAINED = "none"
Data = TypeVar("Data", bound=CodePrompts)


def parser(doc: str | None, config: str, out: Path) -> argparse.ArgumentParser:
    """Return a parser with `--config`, `--checkpoint`, `--dtype` and `--out`.

    Args:
        doc: docstring of the script.
        config: describes the configuration.
        out: default folder of the results.
    """
    made = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        epilog="Options of the configuration go on the command line, too.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("-c", "--config", action="append", default=[], help=config)
    add(
        "--checkpoint",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a policy and its name in the tables; NAME=none: the model without training",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: that of -c)")
    add("--out", type=Path, default=out, help="folder of the results")
    return made


def parsed(
    made: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of `parser`, and those of the configuration.

    Raises:
        UserError: there is no configuration or no checkpoint.
    """
    options, rest = made.parse_known_args(argv)
    for name in ("config", "checkpoint"):
        if not getattr(options, name):
            raise UserError(f"give `--{name}`: -c CONFIG --checkpoint NAME=FILE")
    return options, rest


def named(words: Iterable[str]) -> dict[str, Path | None]:
    """Return checkpoints by name; None: the model without training."""
    checkpoints: dict[str, Path | None] = {}
    for word in words:
        name, _, file = word.partition("=")
        if not re.fullmatch(r"\w[\w.-]*", name) or not file:
            raise UserError(
                f"`--checkpoint` takes NAME=FILE or NAME={UNTRAINED}, got {word!r}; the results "
                "of a policy go into NAME.jsonl"
            )
        if name in checkpoints:
            raise UserError(f"two checkpoints have the name {name!r}")
        checkpoints[name] = None if file == UNTRAINED else Path(file)
    return checkpoints


def read(
    script: str,
    options: argparse.Namespace,
    checkpoints: Mapping[str, Path | None],
    rest: Sequence[str],
    kind: type[Data],
    recipe: str,
) -> tuple[dict[str, CausalPolicy], Data]:
    """Return the policies and the data of a configuration; no weights are loaded.

    Args:
        script: for messages.
        options: of the command line.
        checkpoints: as `named` returns them.
        rest: options of the configuration.
        kind: class of the data.
        recipe: a configuration with such data, for messages.

    Raises:
        UserError: policy or data are of another class, or a checkpoint does not serve.
    """
    policies: dict[str, CausalPolicy] = {}
    data: Any = None
    for name, checkpoint in checkpoints.items():
        cli, policy = read_run(script, options.config, checkpoint, rest)
        data = data or cli.datamodule
        if not isinstance(data, kind) or not isinstance(policy, CausalPolicy):
            raise UserError(
                f"-c needs a `CausalPolicy` and the data `{kind.__name__}`, as `{recipe}` has"
            )
        try:
            policy.check()
        except UserError as error:
            message = str(error).replace("`policy.checkpoint`", "`--checkpoint`")
            raise UserError(message) from error
        if options.dtype:  # behind the checks, which refuse to train 16 bits
            policy.dtype = getattr(torch, options.dtype)
        policies[name] = policy
    return policies, data
