"""Rollouts without a useful group change neither weights nor optimiser."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from lightning_mpo.callbacks import Watchdog
from lightning_mpo.objective.advantages import (
    GeneralizedAdvantage,
    GroupRelative,
    LeaveOneOut,
    ReturnToGo,
)
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.supports import Nucleus, TopK
from lightning_mpo.objective.terms import EntropyBonus, HeadUpkeep
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.policies import ParallelHeads, ValueHead
from tests.support.dynamic import Always, FewLow, train
from tests.support.runs import Probe, adam, distance, make_objective, make_policy, same, sgd

NOTHING = {
    "tokens": {"reduction": TokenMean()},
    "sequences": {"reduction": SequenceMean(), "terms": [EntropyBonus(0.01)]},
    "constant": {
        "reduction": ConstantLength(8),
        "advantage": LeaveOneOut(),
        "terms": [KLPenalty(ConstantCoefficient(0.1))],
    },
    "whitened": {"advantage": GroupRelative("batch")},
    "returns": {
        "advantage": ReturnToGo(),
        "terms": [KLPenalty(ConstantCoefficient(0.1), "k1", "reward")],
    },
    "promising": {"support": TopK(3), "terms": [KLPenalty(ConstantCoefficient(0.1), "exact")]},
    "blocks": {
        "support": Nucleus(0.9, 6),
        "actions": BlockActions(FutureShare(0.2), length=3, source="mtp"),
        "terms": [HeadUpkeep(0.1), ValueLoss()],
        "advantage": GeneralizedAdvantage(),
    },
}


def idle(folder: Path, case: str, **options):
    axes = NOTHING[case]
    heads = {"mtp": ParallelHeads(offsets=2)} if case == "blocks" else {}
    critic = {"critic": ValueHead()} if case == "blocks" else {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        policy = make_policy(**heads, **critic)
        return train(folder, policy=policy, objective=make_objective(**axes), **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NOTHING)
def test_a_rollout_without_a_useful_group_changes_nothing(tmp_path, case):
    """Weights stay bit for bit, also under momentum and decay, and no metric is NaN."""
    before: list[dict[str, torch.Tensor]] = []

    def look(trainer, module, *_):
        before.append(
            {name: weight.detach().clone() for name, weight in module.policy.named_parameters()}
        )

    run, watch = idle(
        tmp_path,
        case,
        rewards=[Always()],
        rounds=2,
        rollout={"minibatches": 2},
        callbacks=[Probe(on_train_start=look), Watchdog(patience=9)],
        module={"optimizer": lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1)},
        accumulate_grad_batches=2,
        max_steps=4,
    )
    assert [len(event.experience.valid_B) for event, _ in watch.events] == [16, 16]
    assert not any(event.experience.valid_B.any() for event, _ in watch.events)
    assert same(run.weights, before[0])
    assert len(run.record.lines) == 4
    for _, line in run.record.lines:
        assert all(value == value and abs(value) < 1e9 for value in line.values()), line
        assert line["optim/grad_norm"] == line["loss/surrogate"] == 0
        assert line["rollout/groups_missing"] == 4


@pytest.mark.filterwarnings("ignore")
def test_momentum_waits_for_an_update_that_teaches(tmp_path):
    """Two updates, an idle rollout of two, two more: the state of the optimiser is that before the idle ones."""

    class Turns(FewLow):
        def score(self, completions):
            self.calls = getattr(self, "calls", 0) + 1
            useful = [float(b % 2) for b in range(len(completions))]
            return [1.0] * len(completions) if self.calls == 2 else useful

    moments = []

    def look(trainer, *_):
        moments.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))

    run, _ = train(
        tmp_path,
        [Turns()],
        rounds=1,
        rollout={"minibatches": 2},
        callbacks=[Probe(on_train_batch_end=look)],
        module={"optimizer": adam(1e-2)},
        max_steps=6,
    )
    assert run.record.column("rollout/groups_missing") == [0, 0, 4, 4, 0, 0]
    steps = [state[0]["step"].item() for state in moments]
    assert steps == [1, 2, 2, 2, 3, 4]
    assert torch.equal(moments[1][0]["exp_avg"], moments[3][0]["exp_avg"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("bonus", "skip"), [(None, True), (EntropyBonus(0.1), True), (None, False)]
)
def test_equal_rewards_are_counted_and_their_updates_skipped(tmp_path, bonus, skip):
    """Without dynamic sampling, a rollout of equal rewards between two that teach: no weight moves, by momentum either.

    With an entropy bonus there is something to learn even then. `skip_idle_updates` set to False steps nevertheless.
    """

    class Turns(FewLow):
        def score(self, completions):
            self.calls = getattr(self, "calls", 0) + 1
            useful = [float(b % 2) if b < 12 else 0.0 for b in range(len(completions))]
            return [1.0] * len(completions) if self.calls == 2 else useful

    weights = []

    def start(trainer, module):
        module.skip_idle_updates = skip

    def look(trainer, module, *_):
        weights.append(
            {name: weight.detach().clone() for name, weight in module.policy.named_parameters()}
        )

    run, _ = train(
        tmp_path,
        [Turns()],
        rounds=None,
        objective=make_objective(terms=[bonus] if bonus else []),
        rollout={"minibatches": 2},
        callbacks=[Probe(on_train_start=start, on_train_batch_end=look)],
        module={"optimizer": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)},
        accumulate_grad_batches=2,
        max_steps=6,
    )
    assert run.record.column("rollout/groups_flat") == [0.25, 0.25, 1, 1, 0.25, 0.25]
    skipped = skip and bonus is None
    assert run.record.column("optim/idle") == [0, 0, skipped, skipped, 0, 0]
    after = weights[1::2]  # of two micro-batches each
    assert same(after[1], after[2]) == same(after[2], after[3]) == skipped
    assert not same(after[3], after[4])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NOTHING)
def test_places_that_stay_free_weigh_nothing(tmp_path, case):
    """Half of the groups are missing, so that some micro-batches have no row that counts: a cut changes no update."""

    class TwoGroups(FewLow):
        def score(self, completions):
            return [float(b % 2) if b < 8 else 0.0 for b in range(len(completions))]

    options = {
        "module": {"optimizer": sgd(0.01)},
        "max_steps": 1,
        "rewards": [TwoGroups()],
        "rounds": 1,
    }
    cut, watch = idle(tmp_path, case, **options, accumulate_grad_batches=4)
    whole, _ = idle(tmp_path, case, **options)
    (event, _), *_ = watch.events
    assert event.experience.valid_B.tolist() == [True] * 8 + [False] * 8

    start, _ = idle(tmp_path, case, **options | {"module": {"optimizer": sgd(0.0)}})
    assert distance(whole.weights, start.weights) > 1e-6
    assert distance(cut.weights, whole.weights) < 1e-6
    assert all(weight.isfinite().all() for weight in cut.weights.values())
