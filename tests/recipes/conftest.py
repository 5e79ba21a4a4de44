"""Fixtures that several files of this folder use."""

from __future__ import annotations

import functools
import sys

import lightning as L
import pytest

from lightning_mpo import cli, recipes
from tests.support.configurations import BASE
from tests.support.peptides import write_modlamp


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Instantiate what a configuration names, without training."""
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(write_modlamp(tmp_path)))
    built: list[tuple] = []
    warmed: list[str] = []

    @functools.wraps(L.Trainer.fit)
    def fit(self, model, train_dataloaders=None, val_dataloaders=None, datamodule=None, **kwargs):
        built.append((model, datamodule, self))

    monkeypatch.setattr(L.Trainer, "fit", fit)
    monkeypatch.setattr(
        "lightning_mpo.cli.parser.fit_first", lambda config, checkpoint, seed: warmed.append(config)
    )

    def run(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["lightning-mpo", "fit", *map(str, arguments)])
        assert cli.run() == 0
        assert all(recipes.find(config).is_file() for config in warmed)
        return built[-1]

    return run
