"""A run dies at the event that was asked for, and at no other."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import KillAt
from lightning_mpo.errors import UserError
from tests.support.runs import fit


class Died(BaseException):
    pass


@pytest.fixture(autouse=True)
def softly(monkeypatch):
    def kill(process, number):
        raise Died

    monkeypatch.setattr(os, "kill", kill)


@pytest.mark.parametrize(
    ("phase", "count", "step", "saved"),
    [
        ("rollout", 9, 1, [1]),
        ("micro-batch", 2, 1, [1]),
        ("update", 2, 2, [1]),
        ("validation", 2, 2, [1, 2]),
        ("write", 3, 1, []),
        ("rename", 2, 2, [1]),
        ("saved", 2, 2, [1, 2]),
    ],
)
def test_it_dies_there(tmp_path, phase, count, step, saved):
    died = []
    killer = KillAt(phase, count)
    killer.on_exception = lambda trainer, *_: died.append(trainer.global_step)
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises((Died, RuntimeError)):  # torch turns what a write raises into a RuntimeError
        fit(tmp_path, callbacks=[killer, save], accumulate_grad_batches=2, limit_val_batches=1, val_check_interval=1,
            check_val_every_n_epoch=None)  # fmt: skip
    assert died == [step]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [
        f"step={step}.ckpt" for step in saved
    ]
    for path in tmp_path.glob("*.ckpt"):
        torch.load(path, weights_only=True)


def test_another_process_is_left_alone(tmp_path):
    assert (
        fit(tmp_path, callbacks=[KillAt("update", 1, rank=1)], max_steps=2).trainer.global_step == 2
    )


def test_what_is_no_event_is_refused():
    for phase, count, wrong in (("lunch", 1, "KillAt.phase"), ("update", 0, "KillAt.count")):
        with pytest.raises(UserError, match=wrong):
            KillAt(phase, count)
