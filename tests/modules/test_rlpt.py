"""Promising tokens under every algorithm and every kind of action: the support is part of the policy everywhere."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.action_spaces import BlockActions, FutureShare, SequenceActions, TokenActions
from lightning_mpo.advantages import GeneralizedAdvantage, GroupRelative
from lightning_mpo.policies import ParallelHeads, ValueHead
from lightning_mpo.reductions import SequenceMean, TokenMean
from lightning_mpo.supports import MinP, Nucleus, TopK
from lightning_mpo.surrogates import ClippedRatio
from lightning_mpo.value_loss import ValueLoss
from tests.modules.runs import Probe, Run, fit, make_objective, make_policy

ALGORITHMS = {
    "grpo": {"advantage": GroupRelative(), "surrogate": ClippedRatio(), "reduction": SequenceMean()},
    "dapo": {"advantage": GroupRelative(), "surrogate": ClippedRatio(0.2, 0.28), "reduction": TokenMean()},
    "ppo": {"advantage": GeneralizedAdvantage(), "critic": ValueLoss()},
    "gspo": {"advantage": GroupRelative(), "surrogate": ClippedRatio(3e-4, 4e-4), "reduction": SequenceMean()},
}
ACTIONS = {
    "token": lambda: TokenActions(),
    "backbone": lambda: BlockActions(FutureShare(0.2), length=3, source="backbone"),
    "mtp": lambda: BlockActions(FutureShare(0.2), length=3, source="mtp"),
    "mtp, full": lambda: BlockActions(FutureShare(0.2), length=3, source="mtp"),
    "sequence": lambda: SequenceActions(mean=True),
}


def plain(lr: float):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def train(folder, algorithm: str, actions: str, support=None, **options) -> tuple[Run, list]:
    """Take two updates on one rollout; return the run and its micro-batches."""
    full = actions.endswith("full")
    heads = ParallelHeads(offsets=2, support="full" if full else "stored") if "mtp" in actions else None
    policy = make_policy(mtp=heads, critic=ValueHead() if algorithm == "ppo" else None)
    policy.config.tie_word_embeddings = False
    seen: list = []
    probe = Probe(on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"]))
    axes = ALGORITHMS[algorithm] | {"actions": ACTIONS[actions](), "support": support or TopK(2)}
    run = fit(
        folder,
        policy=policy,
        objective=make_objective(**axes, **options),
        rollout={"minibatches": 2, "max_new_tokens": 4},
        module={"optimizer": plain(0.1)},
        callbacks=[probe],
        first=True,
        max_steps=2,
    )
    return run, seen


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_promising_tokens_are_trained_and_the_first_ratio_is_one(tmp_path, algorithm, actions):
    run, seen = train(tmp_path, algorithm, actions)
    assert run.record.column("ratio/mean")[0] == pytest.approx(1, abs=1e-5)
    assert run.record.column("support/hit_rate")[0] == 1
    promising = torch.cat([batch.rollout.support_BTK[batch.mask_BT].flatten() for batch in seen]).unique().long()
    rows = torch.arange(run.module.policy.vocabulary)
    tail = rows[~torch.isin(rows, promising)]
    assert len(tail) > 2
    start = make_policy()
    start.config.tie_word_embeddings = False
    before = start.load_network().get_output_embeddings().weight
    moved = (run.module.policy.network.get_output_embeddings().weight != before).any(1)
    assert moved[tail].all() == actions.endswith("full")  # only heads on the whole vocabulary touch the tail
    assert moved[tail].any() == actions.endswith("full")
    assert moved[promising].any()


@pytest.mark.parametrize("actions", ["token", "mtp", "sequence"])
@pytest.mark.parametrize(
    "support", [Nucleus(0.5, 6), MinP(0.3, 6), TopK(3, from_reference=True)], ids=["p", "min", "ref"]
)
def test_every_support_goes_with_every_kind_of_action(tmp_path, actions, support):
    run, seen = train(tmp_path, "grpo", actions, support)
    assert run.record.column("ratio/mean")[0] == pytest.approx(1, abs=1e-5)
    old = seen[0].old_logprobs_BT[seen[0].mask_BT]
    torch.testing.assert_close(old, seen[0].rollout.behaviour_logprobs_BT[seen[0].mask_BT], rtol=0, atol=1e-5)
    assert 0 < run.record.column("support/kept_mass")[0] < 1
