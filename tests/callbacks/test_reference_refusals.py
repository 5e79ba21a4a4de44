"""Schedules of a reference that cannot be used are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_mpo.callbacks import KLTracking, ReferenceUpdate, Report
from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.warmup import SupervisedWarmup
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.rewards.reference import ReferenceReward
from tests.support.runs import fit, make_data, make_objective, make_policy, make_trainer


@pytest.mark.parametrize("every", [0, -1])
def test_it_moves_every_rollout_or_less_often(every):
    with pytest.raises(UserError, match=f"`ReferenceUpdate.every` must be at least 1, got {every}"):
        ReferenceUpdate(every)


@pytest.mark.parametrize("mixup", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_of_the_policy_is_above_0_and_up_to_1(mixup):
    with pytest.raises(UserError, match="`ReferenceUpdate.mixup` must be in"):
        ReferenceUpdate(1, mixup)


def unloadable() -> CausalPolicy:
    policy = make_policy()
    policy.load_network = lambda: pytest.fail("a model was loaded")
    return policy


def test_a_run_without_a_reference_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(
        UserError, match="nothing here asks for one: give `KLPenalty` in `objective.terms`"
    ):
        fit(tmp_path, callbacks=[ReferenceUpdate(1)], policy=unloadable())
    trainer = make_trainer(tmp_path, [ReferenceUpdate(1), KLTracking()])
    with pytest.raises(UserError, match="nothing here asks for one"):
        trainer.fit(SupervisedWarmup(unloadable()), datamodule=make_data())


class FromReference(ReferenceReward):
    def score(self, completions):
        return [0.0 for _ in completions]


@pytest.mark.parametrize("more", [[], [KLTracking()]], ids=["alone", "with kl"])
def test_rewards_against_the_start_of_the_run_keep_their_reference(tmp_path, more):
    message = "`FromReference` reads log-probs of the policy at the start of the run, and `Refer"
    with pytest.raises(UserError, match=message) as caught:
        fit(
            tmp_path,
            rollout={"rewards": [FromReference()]},
            callbacks=[*more, ReferenceUpdate(1)],
            policy=unloadable(),
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "asks", [KLTracking(), Report(problems=2, completions=2, batch_size=4)], ids=["kl", "report"]
)
def test_who_asks_for_the_reference_may_stand_behind_it(tmp_path, asks):
    callbacks = [ReferenceUpdate(1), asks]
    done = fit(tmp_path, callbacks=callbacks, max_steps=2)
    assert done.module.policy.reference_network is not None
    if isinstance(asks, Report):
        assert asks.stages["final"]["kl"] > asks.stages["initial"]["kl"] >= 0


def test_policies_of_another_kind_are_refused():
    objective = make_objective(terms=[KLPenalty(ConstantCoefficient(0.2))])
    module = PolicyOptimization(torch.nn.Identity(), objective)
    with pytest.raises(
        UserError, match="`ReferenceUpdate` needs a `CausalPolicy` or a `MaskedPolicy`, got"
    ):
        ReferenceUpdate(1).setup(SimpleNamespace(callbacks=[], strategy=None), module, "fit")


def test_shards_are_refused(tmp_path):
    module = PolicyOptimization(
        unloadable(), make_objective(terms=[KLPenalty(ConstantCoefficient(0.2))])
    )
    trainer = SimpleNamespace(callbacks=[], strategy=ModelParallelStrategy())
    with pytest.raises(
        UserError,
        match="mixes whole weights, and FSDP2 keeps them in shards; use `trainer.strategy: ddp`",
    ):
        ReferenceUpdate(1).setup(trainer, module, "fit")
