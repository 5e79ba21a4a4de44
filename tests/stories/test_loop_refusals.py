"""Runs that are refused before any weight is loaded, and limits that shrink a run."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from tests.support.loops import Slots
from tests.support.runs import fit, make_data, make_objective

ROOT = Path(__file__).parents[2]


def test_estimated_stepping_batches_is_never_read():
    files = [*(ROOT / "lightning_mpo").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]
    assert len(files) > 40
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", None) or getattr(node, "value", None)
            assert name != "estimated_stepping_batches", (
                f"{path} reads it; a loader's saved state is then dropped"
            )


REFUSED = {
    "limit_train_batches": (
        {"limit_train_batches": 6, "accumulate_grad_batches": 2},
        {"minibatches": 2},
        "a multiple",
    ),
    "share": ({"limit_train_batches": 0.5}, {}, "not a share"),
    "val_check_interval": ({"val_check_interval": 3}, {}, "check_val_every_n_epoch: null"),
    "a share of validation": (
        {"val_check_interval": 0.34},
        {},
        "val_check_interval` must be a whole number of updates",
    ),
    "bf16-true": ({"precision": "bf16-true"}, {}, "bf16-mixed"),
    "accumulation": ({"accumulate_grad_batches": 20}, {}, "accumulate_grad_batches"),
    "minibatches": ({}, {"minibatches": 3}, "must divide"),
    "rewards": ({}, {"rewards": []}, "rollout.rewards"),
    "completions": ({}, {"completions": 1}, "rollout.completions"),
    "max_new_tokens": ({}, {"max_new_tokens": 0}, "max_new_tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_weight_is_loaded(tmp_path, monkeypatch, name):
    from lightning_mpo.policies import TinyPolicy

    monkeypatch.setattr(
        TinyPolicy, "build", lambda *args, **kwargs: pytest.fail("the policy was built")
    )
    trainer, rollout, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        fit(tmp_path, rollout=rollout, **trainer)


def test_scaled_losses_are_refused(tmp_path, monkeypatch):
    """On the CPU Lightning takes bfloat16 for it."""
    monkeypatch.setattr(L.Trainer, "precision", "16-mixed")
    with pytest.raises(
        UserError, match="leaves out the updates whose gradients overflow; use `bf16-mixed`"
    ):
        fit(tmp_path)


def test_accumulation_schedules_are_refused(tmp_path):
    with pytest.raises(UserError, match="GradientAccumulationScheduler"):
        fit(tmp_path, callbacks=[GradientAccumulationScheduler({0: 1, 4: 2})])


def test_a_run_without_the_rollout_callback_names_it():
    from tests.support.runs import make_policy, make_trainer

    module = PolicyOptimization(make_policy(), make_objective())
    with pytest.raises(UserError, match="lightning_mpo.callbacks.RolloutLoop"):
        make_trainer(Path("."), [], max_steps=1).fit(module, datamodule=make_data())


@pytest.mark.parametrize("batches", [1, 3])
def test_fast_dev_run_shrinks_a_rollout_to_one_slot(tmp_path, batches):
    slots = Slots()
    run = fit(
        tmp_path,
        rollout={"minibatches": 4, "epochs": 2},
        accumulate_grad_batches=2,
        fast_dev_run=batches,
        limit_val_batches=1,
        callbacks=[slots],
    )
    assert run.trainer.global_step == batches
    assert run.rollout.counter == batches
    assert [len(part.group_B) for part in slots.rows] == [16] * batches


def test_a_whole_limit_is_an_epoch(tmp_path):
    run = fit(
        tmp_path,
        rollout={"minibatches": 2},
        accumulate_grad_batches=2,
        limit_train_batches=8,
        max_steps=-1,
        max_epochs=2,
    )
    assert run.trainer.global_step == 2 * 4
    assert run.rollout.counter == 4, "the second epoch goes on with the third rollout"
