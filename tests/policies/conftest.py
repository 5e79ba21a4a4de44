"""Fixtures that several files of this folder use."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_mpo.policies import CausalPolicy, ParallelHeads
from tests.support.critics import CRITICS, scramble_critic
from tests.support.mtp import M, scramble


@pytest.fixture
def policy_with_heads(tiny_policy):
    def build(family=ParallelHeads, *, fresh=False, offsets=M, options=None, **rest):
        policy = tiny_policy(mtp=family(offsets=offsets, **(options or {})), double=True, **rest)
        if not fresh:
            scramble(policy.mtp)
        return policy

    return build


@pytest.fixture
def policy_with_critic(tiny_policy):
    """A policy in float64 whose critic has weights that matter."""

    def build(kind="linear", *, fresh=False, **options) -> CausalPolicy:
        policy = tiny_policy(critic=CRITICS[kind](), **({"double": True} | options))
        if not fresh:
            scramble_critic(policy.critic)
        return policy

    return build


@pytest.fixture
def folder(tiny_folder, tmp_path, monkeypatch) -> Path:
    """A copy of a tiny model in the working directory; nobody answers questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def masked_folder(tmp_path_factory) -> Callable[[str], str]:
    """Return the folder of a family of masked models, or of `foreign-FORM`, written once."""
    from tests.support.masked_folders import write_family, write_foreign

    root = tmp_path_factory.mktemp("masked")

    def folder(family: str) -> str:
        path = root / family
        if not path.exists():
            name, _, takes = family.partition("-")
            write_foreign(takes, path) if takes else write_family(name, path)
        return str(path)

    return folder


@pytest.fixture
def code_cache(tmp_path_factory, monkeypatch) -> None:
    """Let transformers copy code of repositories into a temporary folder."""
    from transformers import dynamic_module_utils

    cache = tmp_path_factory.getbasetemp() / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))


@pytest.fixture
def cache(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that sees only the wheels on the shelf of the test file."""
    monkeypatch.setenv("LIGHTNING_MPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache"
