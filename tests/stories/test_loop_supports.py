"""Runs with a support of varying size, and with tokens outside their support."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.supports import FullVocabulary, MinP, Nucleus, TopK
from lightning_mpo.policies import ParallelHeads, TinyPolicy
from lightning_mpo.sampling import LocalSampler
from tests.support.loops import Right
from tests.support.runs import Probe, fit, make_objective, make_policy


@pytest.mark.parametrize("support", [Nucleus(0.25, 6), MinP(0.8, 6)], ids=["nucleus", "min_p"])
@pytest.mark.parametrize("source", ["backbone", "mtp"])
def test_supports_of_varying_size_go_through_sampler_gate_blocks_and_updates(
    tmp_path, support, source
):
    blocks = BlockActions(FutureShare(0.2), length=3, source=source)
    policy = make_policy(mtp=ParallelHeads(offsets=2) if source == "mtp" else None)
    seen = []
    probe = Probe(
        on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"])
    )
    run = fit(
        tmp_path,
        policy=policy,
        objective=make_objective(support=support, actions=blocks),
        rollout={"minibatches": 2},
        callbacks=[probe],
        first=True,
        max_steps=2,
    )
    assert run.record.column("ratio/mean")[0] == pytest.approx(1, abs=1e-5)
    slots = seen[0].rollout.support_mask_BTK[seen[0].mask_BT]
    assert 1 < slots.sum(-1).float().mean() < 6


class Lossy(LocalSampler):
    """Loses the sampled token from its support at the first step of every response, as an external engine may."""

    def sample(self, *args, **options):
        rollout = super().sample(*args, **options)
        if rollout.support_BTK is not None:
            first = rollout.support_BTK[:, 0]
            first[first == rollout.responses_BT[:, :1]] = (
                0  # the padding token, which is never sampled here
            )
        return rollout


@pytest.mark.parametrize(("outside", "scored"), [("unite", True), ("drop", False)])
def test_tokens_outside_their_support_are_counted_and_may_be_left_without_loss(
    tmp_path, outside, scored
):
    seen = []
    probe = Probe(
        on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"])
    )
    run = fit(
        tmp_path,
        objective=make_objective(support=TopK(4, outside=outside)),
        rollout={"sampler": Lossy()},
        callbacks=[probe],
        first=True,
        max_steps=1,
    )
    assert seen[0].rollout.outside_BT[:, 0].all()
    assert seen[0].mask_BT[:, 0].all() == scored
    assert seen[0].mask_BT[:, 1:].equal(seen[0].rollout.response_mask_BT[:, 1:])
    tokens = seen[0].rollout.response_mask_BT.sum().item()
    assert run.record.column("support/hit_rate") == [pytest.approx(1 - 16 / tokens)]
    with pytest.raises(
        UserError, match="16 of .* sampled tokens are not in the support stored with them"
    ):
        fit(
            tmp_path,
            objective=make_objective(support=TopK(4)),
            rollout={"sampler": Lossy()},
            max_steps=1,
        )


def test_validation_samples_untruncated_and_with_the_training_support(tmp_path):
    def lines(support):
        run = fit(
            tmp_path,
            objective=make_objective(support=support),
            rollout={"rewards": [Right()]},
            max_steps=2,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            limit_val_batches=1,
        )
        return {
            name: value
            for _, line in run.record.lines
            for name, value in line.items()
            if name.startswith("val/")
        }

    full, top = lines(FullVocabulary()), lines(TopK(1))
    assert {"val/pass_at_1", "val/support_pass_at_1", "val/support_length"} <= top.keys()
    assert not any("support" in name for name in full)
    assert (
        top["val/reward"] != top["val/support_reward"]
    )  # greedy is what a support of one token means


def test_a_policy_that_ignores_the_support_for_its_reference_is_refused(tmp_path):
    class Mixing(TinyPolicy):
        def score(self, rollout, mask_BT, *, reference=False, **options):
            if reference:
                rollout = replace(rollout, support_BTK=None, support_mask_BTK=None)
            return super().score(rollout, mask_BT, reference=reference, **options)

    policy = Mixing("0123456789+-*=;, ", hidden_size=32, layers=2, heads=2)
    objective = make_objective(support=TopK(4), terms=[KLPenalty(ConstantCoefficient(0.1))])
    with pytest.raises(UserError, match="log-probs of the reference are over the whole vocabulary"):
        fit(tmp_path, policy=policy, objective=objective, max_steps=1)
