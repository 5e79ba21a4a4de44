"""Throughput: rollouts and updates are measured apart, on a clock of the test's own."""

from __future__ import annotations

import pytest

from lightning_mpo.callbacks import Throughput, throughput
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.rollout import collect
from lightning_mpo.sampling.local import LocalSampler
from tests.support.runs import Digits, fit

SAMPLE, SCORE, STEP = 50.0, 30.0, 2.0


class Clock:
    """Stands for the module `time`; only the test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Tokens(RolloutCallback):
    def __init__(self):
        self.tokens = []

    def on_rollout_end(self, trainer, module, event):
        self.tokens.append(event.tokens)


@pytest.mark.parametrize("first", [True, False], ids=["rollout-first", "rollout-last"])
def test_seconds_and_tokens_of_rollout_and_updates(tmp_path, monkeypatch, first):
    """The command line lists the rollout callback last."""
    clock, training_step = Clock(), PolicyOptimization.training_step

    class Sampler(LocalSampler):
        def sample(self, *args, **kwargs):
            clock.now += SAMPLE
            return super().sample(*args, **kwargs)

    class Reward(Digits):
        def score(self, completions):
            clock.now += SCORE
            return super().score(completions)

    def step(self, batch, batch_idx):
        clock.now += STEP
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(collect, "time", clock)
    monkeypatch.setattr(PolicyOptimization, "training_step", step)
    callback, tokens = Throughput(), Tokens()
    run = fit(
        tmp_path,
        callbacks=[callback, tokens],
        rollout={"sampler": Sampler(), "rewards": [Reward()], "epochs": 2, "max_new_tokens": 24},
        accumulate_grad_batches=2,
        max_steps=6,
        first=first,
    )
    assert len(set(tokens.tokens)) == 3
    for i, line in enumerate(line for _, line in run.record.lines[::2]):
        assert (line["time/rollout_s"], line["time/prepare_s"]) == (SAMPLE, SCORE)
        assert line["throughput/rollout_tokens_per_s"] == pytest.approx(tokens.tokens[i] / SAMPLE)
        if i:
            assert line["time/updates_s"] == 4 * STEP, (
                "two passes of two micro-batches, of the rollout before"
            )
            assert line["throughput/update_tokens_per_s"] == pytest.approx(
                2 * tokens.tokens[i - 1] / (4 * STEP)
            )
        else:
            assert "time/updates_s" not in line
    assert callback.seconds == {"rollout": 3 * SAMPLE, "prepare": 3 * SCORE, "update": 12 * STEP}
