"""One gradient however an update is cut, and the metrics that are logged of it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_mpo.modules.update_metrics import UpdateMetrics
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.supports import TopK
from tests.support.runs import Digits, adam, distance, fit, make_objective, sgd

REDUCTIONS = [TokenMean(), SequenceMean(), ConstantLength(8)]


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda reduction: type(reduction).__name__)
def test_cutting_an_update_into_micro_batches_changes_no_weight(tmp_path, reduction):
    """SGD, as Adam would blow rounding up; lengths differ, so a mean of means would show."""
    objectives = {
        "tokens": make_objective(reduction=reduction),
        "blocks": make_objective(
            reduction=reduction, actions=BlockActions(FutureShare(0.3), length=3), support=TopK(6),
            terms=[KLPenalty(ConstantCoefficient(0.2))],
        ),
    }  # fmt: skip
    for objective in objectives.values():
        runs = {
            cuts: fit(
                tmp_path,
                rollout={"minibatches": 2, "max_new_tokens": 16},
                objective=objective,
                accumulate_grad_batches=cuts,
                max_steps=4,
                module={"optimizer": sgd(0.02)},
            )
            for cuts in (1, 2, 4)
        }
        start = fit(
            tmp_path, objective=objective, module={"optimizer": sgd(0.0)}, max_steps=1
        ).weights
        assert distance(runs[1].weights, start) > 1e-4
        for cuts in (2, 4):
            assert distance(runs[cuts].weights, runs[1].weights) < 1e-6
            for (step, whole), (other, cut) in zip(
                runs[1].record.lines, runs[cuts].record.lines, strict=True
            ):
                assert step == other
                assert {k: v for k, v in cut.items()} == pytest.approx(whole, rel=2e-4, abs=2e-6)


def test_metrics_are_logged_once_an_update_and_weighted_over_its_micro_batches(tmp_path):
    """Against a sum over the micro-batches by hand, through the CSV file."""
    parts = []
    add = UpdateMetrics.add

    def spy(self, metrics):
        if "loss/surrogate" in metrics:  # of a micro-batch; others are of the whole update
            parts.append(
                {name: (value.item(), weight.item()) for name, (value, weight) in metrics.items()}
            )
        add(self, metrics)

    logger = CSVLogger(tmp_path, name="", version="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UpdateMetrics, "add", spy)
        fit(
            tmp_path, rollout={"minibatches": 2, "max_new_tokens": 24}, accumulate_grad_batches=3, max_steps=4, logger=logger,
            module={"optimizer": adam(1e-2)},
        )  # fmt: skip
    import csv

    lines = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [int(line["step"]) for line in lines] == [0, 1, 2, 3]
    differs = 0
    for update, line in enumerate(lines):
        three = parts[3 * update : 3 * update + 3]
        for name in (
            "policy/entropy",
            "kl/old",
            "ratio/mean",
            "ratio/abs_log",
            "ratio/clip_fraction",
        ):
            total, weight = (sum(part[name][i] for part in three) for i in (0, 1))
            assert float(line[name]) == pytest.approx(total / weight, rel=1e-5, abs=1e-9), name
            last = three[-1][name][0] / three[-1][name][1]
            differs += abs(last - total / weight) > 1e-3
        assert float(line["loss/surrogate"]) == pytest.approx(
            sum(part["loss/surrogate"][0] for part in three), rel=1e-5, abs=1e-8
        )
        assert len({part["policy/entropy"][1] for part in three}) > 1, (
            "micro-batches of one size show nothing"
        )
    assert differs > 4, "the last micro-batch alone would have passed"


def test_a_rollouts_numbers_stand_beside_each_of_its_updates(tmp_path):
    run = fit(tmp_path, rollout={"minibatches": 2, "rewards": [Digits(weight=2.0)]}, max_steps=4)
    assert run.record.column("rollout/counter") == [0, 0, 1, 1]
    rewards = run.record.column("reward/mean")
    assert rewards[0] == rewards[1] != rewards[2] == rewards[3]
    assert run.record.column("reward/digits") == pytest.approx([reward / 2 for reward in rewards])


def test_reward_metrics_are_those_of_the_rollout(tmp_path):
    events = []

    class Keep(Digits):
        def score(self, completions):
            events.append(completions)
            return super().score(completions)

    run = fit(
        tmp_path,
        rollout={"rewards": [Keep()], "max_new_tokens": 24},
        max_steps=1,
        objective=make_objective(support=TopK(3)),
    )
    (completions,) = events
    scores = torch.tensor(Digits().score(completions), dtype=torch.float64)
    line = run.record.lines[0][1]
    assert line["reward/mean"] == pytest.approx(scores.mean().item(), rel=1e-6)
    assert line["reward/std"] == pytest.approx(scores.std().item(), rel=1e-5)
    assert line["rollout/length"] == pytest.approx(sum(done.tokens for done in completions) / 16)
    assert line["rollout/truncated"] == pytest.approx(
        sum(not done.finished for done in completions) / 16
    )
    assert 0 < line["support/kept_mass"] < 1
