"""Fixtures that several files of this folder use."""

from __future__ import annotations

import shutil
import sys
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
