"""Objectives from configuration files, for use from Python, read by the parser of the command line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from omegaconf.errors import OmegaConfBaseException

from lightning_mpo.cli.messages import one_line
from lightning_mpo.errors import UserError, user_error
from lightning_mpo.objective.objective import Objective
from lightning_mpo.recipes import find, read, with_includes


def read_objective(names: Sequence[str | Path], max_new_tokens: int | None = None) -> Objective:
    """Return the objective of recipes or configuration files; later ones overlay earlier ones, key by key.

    Args:
        names: of recipes, or paths.
        max_new_tokens: longest response, for algorithms that depend on it (`dr_grpo`); None: that of the files.

    Raises:
        UserError: a file is missing, no file sets an objective, or an option is wrong.
    """
    if not names:
        raise UserError('`Objective.from_file` needs a recipe or a file, such as "grpo"')
    listed = ", ".join(str(name) for name in names)
    contents = [read(path) for name in names for path in with_includes(find(str(name)))]
    objectives = [_nested(content, "model", "init_args", "objective") for content in contents]
    if not any(objectives):
        raise UserError(
            f"{listed} sets no `model.init_args.objective`; `lightning-mpo configs` lists the algorithms"
        )
    lengths = [_nested(content, "rollout", "max_new_tokens") for content in contents] + [
        max_new_tokens
    ]
    if "${rollout.max_new_tokens}" in json.dumps(objectives) and not any(lengths):
        raise UserError(f"{listed}: an axis depends on the longest response: give `max_new_tokens`")
    arguments: list[str] = []
    for content, objective in zip(contents, objectives, strict=True):
        length = _nested(content, "rollout", "max_new_tokens")
        part = {"objective": objective} if objective else {}
        part |= {"rollout": {"max_new_tokens": length}} if length is not None else {}
        arguments += ["--config", json.dumps(part)] if part else []
    arguments += (
        [f"--rollout.max_new_tokens={max_new_tokens}"] if max_new_tokens is not None else []
    )
    objective = _parse(arguments, listed)
    dynamic = [part for content in contents if (part := _nested(content, "rollout", "dynamic"))]
    if dynamic:
        kind = (
            dynamic[-1].get("class_path", dynamic[-1])
            if isinstance(dynamic[-1], dict)
            else dynamic[-1]
        )
        warnings.warn(
            f"{listed} also sets `rollout.dynamic` to `{kind}`, which is not part of the objective: give it to "
            "`RolloutLoop(dynamic=…)`",
            stacklevel=3,
        )
    return objective


def _parse(arguments: list[str], listed: str) -> Objective:
    """Build an objective as the command line does.

    Raises:
        UserError: an option is wrong.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser = ArgumentParser(parser_mode="omegaconf+", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--objective", type=Objective)
    parser.add_argument("--rollout.max_new_tokens", type=int | None)
    try:
        return parser.instantiate_classes(parser.parse_args(arguments)).objective
    except ArgumentError as error:
        raise UserError(f"{listed}: {one_line(str(error))}") from error
    except OmegaConfBaseException as error:
        raise UserError(
            f"{listed}: `{error.full_key}`: {str(error.msg).splitlines()[0]}"
        ) from error
    except ValueError as error:  # the parser wraps what a constructor raises
        cause = user_error(error)
        if cause is None:
            raise
        raise UserError(f"{listed}: {cause}") from error


def _nested(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content
