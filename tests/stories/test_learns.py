"""A run learns: from two habits that imitation taught, blocks over promising tokens find the one that is rewarded.

Nothing here hangs on a seed or on how a CPU rounds. Imitation goes on until the held-out loss is near its floor. Every
run then starts from two habits of about equal weight: the reward is about one half, and one once the habit is found.
How fast differs between seeds, so a run goes on until its reward has risen by 0.25, for 200 rollouts at most. A rise is
a difference of means over four rollouts and two, each of 144 samples. Its standard error is at most 0.036. By luck a
run without learning would pass with a probability below 200 x 2e-12.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_mpo.modules import SupervisedWarmup
from tests.support.learning import GAIN, Copies, gain, learn, rewards, tiny
from tests.support.runs import adam, make_trainer, same

SEEDS = [int(seed) for seed in os.environ.get("LEARNING_SEEDS", "0 1 2").split()]
FLOOR = math.log(2) / 7
"""Nats a token, of which a solution has seven: its first digit is one of two, and all that follows from it is known."""


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> str:
    """Imitate both habits until the rest is known."""
    folder = tmp_path_factory.mktemp("warm")
    torch.manual_seed(SEEDS[0])
    module = SupervisedWarmup(tiny(), batch_size=30, batches_per_epoch=30, optimizer=adam(5e-3))
    stop = EarlyStopping("val/loss", stopping_threshold=FLOOR + 0.02, patience=1000)
    save = ModelCheckpoint(dirpath=folder, save_last=True)
    trainer = make_trainer(
        folder, [stop, save], max_steps=1500, gradient_clip_val=1.0, limit_val_batches=1.0
    )
    trainer.fit(module, datamodule=Copies())
    assert trainer.global_step < 1500
    return f"{folder}/last.ckpt"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_reward_rises(tmp_path, warm, seed):
    curve = rewards(tmp_path, warm, seed, 1e-3)
    assert 0.2 < curve[0] < 0.7, "there must be something to learn, and something to learn from"
    assert gain(curve) > GAIN, curve


def test_without_a_learning_rate_it_cannot(tmp_path, warm):
    """The weights stay bit for bit; with one they do not."""
    state = torch.load(warm, weights_only=False)["state_dict"]
    for lr in (0.0, 1e-3):
        weights = learn(tmp_path, warm, 0, lr, rollouts=2).weights
        assert same({name: state[f"policy.{name}"] for name in weights}, weights) == (lr == 0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_reward_rises_on_two_processes(tmp_path, warm, strategy):
    script = str(Path(__file__).parents[1] / "support" / "learning_ranks.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PL_")} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, script, str(tmp_path), warm, strategy]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert gain(curve) > GAIN, curve
