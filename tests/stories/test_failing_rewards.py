"""Training with a reward that fails on some completions: they are counted, also after a resume."""

from __future__ import annotations

import os

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import ExactResume, RolloutLoop
from lightning_mpo.objective.decoupled import DecoupledRelative
from tests.support.runs import fit, make_objective, same


def crashes_on_threes(completions):
    """End the process if a response contains a 3; it works in a helper process alone."""
    if any("3" in text for text in completions):
        os._exit(1)
    return [float(len(text)) for text in completions]


def counts_ones(completions):
    return [float(text.count("1")) for text in completions]


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_a_crashing_reward_goes_on_and_a_resumed_run_counts_the_same(tmp_path):
    options = {
        "rollout": {
            "rewards": [crashes_on_threes, counts_ones],
            "reward_process": True,
            "failed_reward": -1.0,
        },
        "objective": make_objective(advantage=DecoupledRelative()),
    }
    whole = fit(tmp_path / "whole", max_steps=4, **options)
    shares = whole.record.column("reward/failed")
    assert len(shares) == 4
    assert all(0 < share < 1 for share in shares)
    # the same in two parts
    save = ModelCheckpoint(tmp_path / "half", every_n_train_steps=2, save_last=True)
    fit(tmp_path / "half", max_steps=2, callbacks=[save, ExactResume()], **options)
    rest = fit(
        tmp_path / "rest",
        max_steps=4,
        callbacks=[ExactResume()],
        ckpt_path=str(tmp_path / "half" / "last.ckpt"),
        **options,
    )
    # a resumed run first repeats the row that the save lost
    assert rest.record.column("reward/failed")[-2:] == shares[2:]
    assert same(rest.weights, whole.weights)


def test_the_rewards_that_have_worked_are_in_the_checkpoint():
    loop = RolloutLoop([counts_ones])
    loop.caller.failures.load({0: 3})
    again = RolloutLoop([counts_ones])
    again.load_state_dict(loop.state_dict())
    assert again.caller.failures.total_failures == {0: 3}
