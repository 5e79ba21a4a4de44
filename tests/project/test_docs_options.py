"""Options on the pages exist here and in TRL."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_mpo
from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.cli.other_libraries import OPTIONS
from lightning_mpo.data import PromptDataModule, Table
from lightning_mpo.data.source import TableSource
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.objective.objective import Objective
from lightning_mpo.policies import CausalPolicy
from tests.support.pages import FROM_TRL, rows

TOP = ("seed_everything", "ckpt_path")
"""Options beside the sections, of LightningCLI."""


@cache
def arguments(owner: type) -> set[str]:
    return set(inspect.signature(owner.__init__).parameters) - {"self"}


def is_option(path: str) -> bool:
    """Whether a short path of the table is an option: of a section, or of a class that it names."""
    section, _, name = path.partition(".")
    owners = {
        "rollout": arguments(RolloutLoop),
        "trainer": arguments(L.Trainer),
        "model": arguments(PolicyOptimization),
        "data": arguments(Table) | arguments(TableSource) | arguments(PromptDataModule),
        "policy": arguments(CausalPolicy),
        "objective": {item.name for item in fields(Objective)},
    }
    if not name:
        return section in TOP or hasattr(lightning_mpo, section)
    if section in owners:
        return name in owners[section]
    owner = (
        ModelCheckpoint if section == "ModelCheckpoint" else getattr(lightning_mpo, section, None)
    )
    return owner is not None and name in arguments(owner)


def test_a_wrong_option_is_seen():
    assert not any(
        map(is_option, ["rollout.temperature", "ClippedRatio.epsilon", "NoClass.low", "seed"])
    )


def test_options_of_the_table_exist_here():
    table = rows(FROM_TRL, "Option names")
    assert len(table) > 50
    assert [ours for _, ours, _ in table if not is_option(ours.strip("`"))] == []
    spans = {span for _, _, note in table for span in re.findall(r"`(\w+\.\w+)`", note)}
    assert [span for span in spans if not is_option(span) and not span.startswith("torch.")] == []


def test_options_of_trl_point_to_the_same_place_on_the_command_line():
    """A wrong option prints `OPTIONS`: what that names last must be what the table names last."""
    for theirs, ours, _ in rows(FROM_TRL, "Option names"):
        name, last = theirs.strip("`"), ours.strip("`").rpartition(".")[2]
        same = {"temperature", "max_steps"}  # the table has them, a wrong place has another message
        assert name in OPTIONS or name in same, name
        assert name in same or last in OPTIONS[name], f"{name}: {OPTIONS[name]}"


def test_options_of_trl_exist_there():
    trl, transformers = importlib.util.find_spec("trl"), importlib.util.find_spec("transformers")
    if trl is None:
        pytest.skip("TRL is not installed")
    known: set[str] = {
        "max_prompt_length",
        "model_name_or_path",
    }  # of its command line, and of earlier releases
    for spec, file in (
        (trl, "trainer/grpo_config.py"),
        (trl, "trainer/grpo_trainer.py"),
        (trl, "trainer/base_config.py"),
        (transformers, "training_args.py"),
    ):
        for node in ast.walk(ast.parse((Path(spec.origin).parent / file).read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known.add(node.target.id)
            elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
                known |= {argument.arg for argument in node.args.args}
    names = {theirs.strip("`") for theirs, _, _ in rows(FROM_TRL, "Option names")}
    assert names - known == set()
