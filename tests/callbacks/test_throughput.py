"""Throughput: rollouts and updates are measured apart."""

from __future__ import annotations

import time

import pytest

from lightning_mpo.callbacks import Throughput
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.source import RolloutCallback
from lightning_mpo.rollout.local import LocalSampler
from tests.modules.runs import Digits, fit

SAMPLE, SCORE, STEP = 0.05, 0.03, 0.02


class SlowSampler(LocalSampler):
    def sample(self, *args, **kwargs):
        time.sleep(SAMPLE)
        return super().sample(*args, **kwargs)


class SlowReward(Digits):
    def score(self, completions):
        time.sleep(SCORE)
        return super().score(completions)


class Tokens(RolloutCallback):
    def __init__(self):
        self.tokens = []

    def on_rollout_end(self, trainer, module, event):
        self.tokens.append(event.tokens)


@pytest.mark.parametrize("first", [True, False], ids=["rollout-first", "rollout-last"])
def test_seconds_and_tokens_of_rollout_and_updates(tmp_path, monkeypatch, first):
    """Sleeps stand for the three phases. The command line lists the rollout callback last."""
    training_step = PolicyOptimization.training_step

    def slow(self, batch, batch_idx):
        time.sleep(STEP)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(PolicyOptimization, "training_step", slow)
    throughput, tokens = Throughput(), Tokens()
    rollout = {"sampler": SlowSampler(), "rewards": [SlowReward()], "epochs": 2}
    run = fit(
        tmp_path, callbacks=[throughput, tokens], rollout=rollout, accumulate_grad_batches=2, max_steps=6, first=first
    )
    line = run.record.lines[2][1]  # the second rollout's first update
    assert SAMPLE <= line["time/rollout_s"] < SAMPLE + 0.5
    assert SCORE <= line["time/prepare_s"] < SCORE + 0.5
    assert line["throughput/rollout_tokens_per_s"] == pytest.approx(tokens.tokens[1] / line["time/rollout_s"], rel=1e-5)
    assert line["time/updates_s"] >= 4 * STEP, "four micro-batches of the rollout before"
    spent = tokens.tokens[0] * 2 / line["time/updates_s"]
    assert line["throughput/update_tokens_per_s"] == pytest.approx(spent, rel=1e-5), "each token in both passes"
    assert "time/updates_s" not in run.record.lines[0][1]
    assert throughput.seconds["rollout"] == pytest.approx(sum(run.record.column("time/rollout_s")[::2]), rel=1e-4)
    assert throughput.seconds["prepare"] == pytest.approx(sum(run.record.column("time/prepare_s")[::2]), rel=1e-4)
    assert throughput.seconds["update"] >= 12 * STEP


def test_the_time_of_an_update_holds_no_rollout(tmp_path):
    rollout = {"sampler": SlowSampler(), "rewards": [SlowReward()]}
    run = fit(tmp_path, callbacks=[Throughput()], rollout=rollout, max_steps=5)
    assert min(run.record.column("time/updates_s")) < SAMPLE
