"""Callbacks that watch a metric in the wrong direction, or one that is never logged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_mpo.errors import UserError
from lightning_mpo.hyperparameters import flatten
from lightning_mpo.modules.monitors import check_callbacks


def trainer(*callbacks, limit=1.0):
    return SimpleNamespace(callbacks=list(callbacks), limit_val_batches=limit, fast_dev_run=False)


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
@pytest.mark.parametrize(
    ("monitor", "better"),
    [
        ("val/pass@1", "max"),
        ("val/reward", "max"),
        ("reward/mean", "max"),
        ("reward/accuracy", "max"),
        ("val/support pass@1", "max"),
        ("val/accuracy_1", "max"),
        ("loss", "min"),
        ("loss/policy", "min"),
        ("val/loss", "min"),
        ("kl/reference", "min"),
        ("val/cross_entropy", "min"),
        ("val/truncated", "min"),
    ],
)
def test_the_direction_of_a_metric(kind, monitor, better):
    worse = {"max": "min", "min": "max"}[better]
    check_callbacks(trainer(kind(monitor=monitor, mode=better)))
    with pytest.raises(UserError, match=f"`{kind.__name__}` watches `{monitor}` with `mode: {worse}`"):
        check_callbacks(trainer(kind(monitor=monitor, mode=worse)))


def test_metrics_of_ones_own_are_left_alone():
    for mode in ("min", "max"):
        check_callbacks(trainer(EarlyStopping(monitor="my/number", mode=mode), ModelCheckpoint(monitor=None)))


def test_a_metric_that_is_never_logged():
    with pytest.raises(UserError, match="`val/pass1`, which no run logs; did you mean `val/pass@1`"):
        check_callbacks(trainer(EarlyStopping(monitor="val/pass1", mode="max")))
    with pytest.raises(UserError, match="never logged: `trainer.limit_val_batches` is 0"):
        check_callbacks(trainer(EarlyStopping(monitor="val/pass@1", mode="max"), limit=0))


def test_options_are_flat_and_short():
    config = {
        "seed": 0,
        "model": {"class_path": "a.B", "init_args": {"lr": 0.1, "policy": {"class_path": "a.P", "init_args": {}}}},
        "rewards": [{"class_path": "a.R", "init_args": {"weight": 2.0}}, {"class_path": "a.S"}],
        "text": "x" * 1000,
        "sizes": [1, 2],
    }
    flat = flatten(config)
    assert flat["model"] == "B"
    assert flat["model.lr"] == 0.1
    assert flat["model.policy"] == "P"
    assert flat["rewards.0.weight"] == 2.0
    assert flat["rewards.1"] == "S"
    assert len(flat["text"]) < 300
    assert flat["sizes"] == "[1, 2]"
