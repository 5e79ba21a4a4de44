"""Objectives from configuration files, for use from Python."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_mpo.cli.messages import parser_mistake
from lightning_mpo.cli.settings import PARSER_OPTIONS, resolve_references_within_verbs
from lightning_mpo.errors import UserError, user_error
from lightning_mpo.objective.objective import Objective
from lightning_mpo.recipes import find, read, with_includes
from lightning_mpo.recipes.tree import value_at


def read_objective(names: Sequence[str | Path], max_new_tokens: int | None = None) -> Objective:
    """Return the objective of recipes or configuration files.

    Later files win over earlier ones, key by key. The parser of the command line reads them.

    Args:
        names: names of recipes, or paths.
        max_new_tokens: longest response in tokens, for algorithms that depend on it (`dr_grpo`);
            None: that of the files.

    Raises:
        UserError: a file is missing, no file sets an objective, or an option is wrong.
    """
    # read the files and all that they include
    if not names:
        raise UserError('`Objective.from_file` needs a recipe or a file, such as "grpo"')
    listed = ", ".join(str(name) for name in names)
    contents = [read(path) for name in names for path in with_includes(find(str(name)))]
    # the objective of each file
    objectives = [value_at(content, "model", "init_args", "objective") for content in contents]
    if not any(objectives):
        raise UserError(
            f"{listed} sets no `model.init_args.objective`; `lightning-mpo configs` lists the "
            "algorithms"
        )
    # the longest response, which some axes refer to
    lengths = [value_at(content, "rollout", "max_new_tokens") for content in contents]
    refers_to_length = "${rollout.max_new_tokens}" in json.dumps(objectives)
    if refers_to_length and not any([*lengths, max_new_tokens]):
        raise UserError(f"{listed}: an axis depends on the longest response: give `max_new_tokens`")
    # parse both as the command line does
    arguments: list[str] = []
    for objective, length in zip(objectives, lengths, strict=True):
        section: dict[str, Any] = {"objective": objective} if objective else {}
        section |= {"rollout": {"max_new_tokens": length}} if length is not None else {}
        arguments += ["--config", json.dumps(section)] if section else []
    if max_new_tokens is not None:
        arguments.append(f"--rollout.max_new_tokens={max_new_tokens}")
    parsed = _parse(arguments, listed)
    _warn_of_dynamic_sampling(contents, listed)
    return parsed


def _warn_of_dynamic_sampling(contents: Sequence[dict[str, Any]], listed: str) -> None:
    """Warn if files set `rollout.dynamic`, which is not part of an objective."""
    dynamic = [part for content in contents if (part := value_at(content, "rollout", "dynamic"))]
    if dynamic:
        last = dynamic[-1]
        kind = last.get("class_path", last) if isinstance(last, dict) else last
        warnings.warn(
            f"{listed} also sets `rollout.dynamic` to `{kind}`, which is not part of the "
            "objective: give it to `RolloutLoop(dynamic=…)`",
            stacklevel=4,
        )


def _parse(arguments: list[str], listed: str) -> Objective:
    """Build an objective as the command line does.

    Args:
        arguments: of the parser.
        listed: the files, for messages.

    Raises:
        UserError: an option is wrong.
    """
    resolve_references_within_verbs()
    parser = ArgumentParser(**PARSER_OPTIONS)
    parser.add_argument("--config", action="config")
    parser.add_argument("--objective", type=Objective)
    parser.add_argument("--rollout.max_new_tokens", type=int | None)
    try:
        return parser.instantiate_classes(parser.parse_args(arguments)).objective
    except Exception as error:
        mistake = parser_mistake(error)
        if mistake is None and isinstance(error, ValueError):
            cause = user_error(error)  # the parser wraps the error of a constructor
            mistake = None if cause is None else str(cause)
        if mistake is None:
            raise
        raise UserError(f"{listed}: {mistake}") from error
