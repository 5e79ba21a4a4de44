"""Callbacks that watch a metric in the wrong direction, or one that is never logged."""

from __future__ import annotations

import re
from types import SimpleNamespace

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_mpo.cli.hyperparameters import flatten
from lightning_mpo.errors import UserError
from lightning_mpo.modules.monitors import check_callbacks
from lightning_mpo.objective.supports import FullVocabulary


class PolicyOptimization:
    """Stands for the stage."""

    __module__ = "lightning_mpo.modules"
    objective = SimpleNamespace(support=FullVocabulary())


class SubclassOfAUser(PolicyOptimization):
    __module__ = "mine"


class CallbackOfAUser(L.Callback):
    __module__ = "mine"


def trainer(*callbacks, limit=1.0, module=None):
    return SimpleNamespace(
        callbacks=list(callbacks),
        limit_val_batches=limit,
        fast_dev_run=False,
        lightning_module=module,
    )


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
@pytest.mark.parametrize(
    ("monitor", "better"),
    [
        ("val/pass_at_1", "max"),
        ("val/reward", "max"),
        ("reward/mean", "max"),
        ("reward/accuracy", "max"),
        ("val/support_pass_at_1", "max"),
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
    with pytest.raises(
        UserError, match=f"`{kind.__name__}` watches `{monitor}` with `mode: {worse}`"
    ):
        check_callbacks(trainer(kind(monitor=monitor, mode=worse)))


def test_metrics_of_ones_own_are_left_alone():
    for mode in ("min", "max"):
        check_callbacks(
            trainer(EarlyStopping(monitor="my/number", mode=mode), ModelCheckpoint(monitor=None))
        )


@pytest.mark.parametrize(
    ("monitor", "hint"),
    [
        ("val/pass1", "did you mean `val/pass_at_1`"),
        ("val_reward", "did you mean `val/reward`"),
        ("val/loss", "which no PolicyOptimization logs"),
        ("loss", "did you mean `loss/surrogate`"),
        ("loss/policy", "which no PolicyOptimization logs"),
        ("accuracy", "which no PolicyOptimization logs"),
        ("val/support_pass_at_1", "which no PolicyOptimization logs"),
    ],
)
def test_a_metric_that_no_stage_logs(monitor, hint):
    callback = EarlyStopping(monitor=monitor, mode="min" if "loss" in monitor else "max")
    with pytest.raises(UserError, match=re.escape(hint)):
        check_callbacks(trainer(callback, module=PolicyOptimization()))
    check_callbacks(trainer(callback, module=SubclassOfAUser()))
    check_callbacks(trainer(callback, CallbackOfAUser(), module=PolicyOptimization()))


@pytest.mark.parametrize(
    "monitor", ["val/pass_at_1", "val/judged", "reward/mean", "reward/MathAnswer", "value/error"]
)
def test_a_metric_that_the_stage_logs(monitor):
    check_callbacks(
        trainer(EarlyStopping(monitor=monitor, mode="max"), module=PolicyOptimization())
    )


def test_a_metric_of_a_validation_that_never_is():
    with pytest.raises(UserError, match="never logged: `trainer.limit_val_batches` is 0"):
        check_callbacks(trainer(EarlyStopping(monitor="val/pass_at_1", mode="max"), limit=0))


def test_options_are_flat_and_short():
    config = {
        "seed": 0,
        "model": {
            "class_path": "a.B",
            "init_args": {"lr": 0.1, "policy": {"class_path": "a.P", "init_args": {}}},
        },
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
