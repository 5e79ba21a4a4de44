"""Fixtures that several files of this folder use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_mpo import cli
from lightning_mpo.cli import parser
from tests.support.configurations import BASE


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a small configuration of a run."""
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(monkeypatch):
    """Run the command line in this process."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["lightning-mpo", *map(str, arguments)])
        return cli.run()

    return run


@pytest.fixture
def runs(monkeypatch) -> list[parser.CLI]:
    """Collect what was fitted."""
    done: list[parser.CLI] = []
    monkeypatch.setattr(parser.CLI, "after_fit", lambda self: done.append(self), raising=False)
    return done
