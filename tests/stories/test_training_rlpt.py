"""Promising tokens under every algorithm and every kind of action: the support is part of the policy everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.callbacks import SupportOverlap
from lightning_mpo.errors import UserError
from lightning_mpo.functional.divergences import exact_on_support
from lightning_mpo.objective.action_spaces import SequenceActions, TokenActions
from lightning_mpo.objective.advantages import GeneralizedAdvantage, GroupRelative
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.reductions import SequenceMean, TokenMean
from lightning_mpo.objective.supports import FullVocabulary, MinP, Nucleus, TopK
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.policies import ParallelHeads, ValueHead
from tests.support.runs import Probe, Run, fit, make_objective, make_policy

ALGORITHMS = {
    "grpo": {
        "advantage": GroupRelative(),
        "surrogate": ClippedRatio(),
        "reduction": SequenceMean(),
    },
    "dapo": {
        "advantage": GroupRelative(),
        "surrogate": ClippedRatio(0.2, 0.28),
        "reduction": TokenMean(),
    },
    "ppo": {"advantage": GeneralizedAdvantage(), "terms": [ValueLoss()]},
    "gspo": {
        "advantage": GroupRelative(),
        "surrogate": ClippedRatio(3e-4, 4e-4),
        "reduction": SequenceMean(),
    },
}
ACTIONS = {
    "token": lambda: TokenActions(),
    "backbone": lambda: BlockActions(FutureShare(0.2), length=3, source="backbone"),
    "mtp": lambda: BlockActions(FutureShare(0.2), length=3, source="mtp"),
    "mtp, full": lambda: BlockActions(FutureShare(0.2), length=3, source="mtp"),
    "sequence": lambda: SequenceActions(
        mean=True, form="token"
    ),  # PPO gives tokens advantages of their own
}


def plain(lr: float):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def train(folder, algorithm: str, actions: str, support=None, **options) -> tuple[Run, list]:
    """Take two updates on one rollout; return the run and its micro-batches."""
    full = actions.endswith("full")
    heads = (
        ParallelHeads(offsets=2, support="full" if full else "stored") if "mtp" in actions else None
    )
    policy = make_policy(mtp=heads, critic=ValueHead() if algorithm == "ppo" else None)
    policy.config.tie_word_embeddings = False
    seen: list = []
    probe = Probe(
        on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"])
    )
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
    promising = (
        torch.cat([batch.rollout.support_BTK[batch.mask_BT].flatten() for batch in seen])
        .unique()
        .long()
    )
    rows = torch.arange(run.module.policy.vocabulary)
    tail = rows[~torch.isin(rows, promising)]
    assert len(tail) > 2
    start = make_policy()
    start.config.tie_word_embeddings = False
    before = start.load_network().get_output_embeddings().weight
    moved = (run.module.policy.network.get_output_embeddings().weight != before).any(1)
    assert moved[tail].all() == actions.endswith(
        "full"
    )  # only heads on the whole vocabulary touch the tail
    assert moved[tail].any() == actions.endswith("full")
    assert moved[promising].any()


@pytest.mark.parametrize("actions", ["token", "mtp", "sequence"])
@pytest.mark.parametrize(
    "support",
    [Nucleus(0.5, 6), MinP(0.3, 6), TopK(3, from_reference=True)],
    ids=["p", "min", "ref"],
)
def test_every_support_goes_with_every_kind_of_action(tmp_path, actions, support):
    run, seen = train(tmp_path, "grpo", actions, support)
    assert run.record.column("ratio/mean")[0] == pytest.approx(1, abs=1e-5)
    old = seen[0].old_logprobs_BT[seen[0].mask_BT]
    torch.testing.assert_close(
        old, seen[0].rollout.behaviour_logprobs_BT[seen[0].mask_BT], rtol=0, atol=1e-5
    )
    assert 0 < run.record.column("support/kept_mass")[0] < 1


@pytest.mark.parametrize("support", [TopK(4), Nucleus(0.5, 6)], ids=["k", "p"])
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_the_exact_divergence_is_the_sum_over_the_stored_support(tmp_path, place, support):
    """Of policy and reference on the same support, from dense logits; two updates apart, so that it is not zero."""
    looks = []

    def look(trainer, module, batch, batch_idx):
        experience = module.source.experience
        scores = module.score(experience.rollout, request=module.objective.request)
        looks.append((experience, scores.support_logits_BTK, dense(module, experience.rollout)))

    kl = KLPenalty(ConstantCoefficient(0.5), "exact", place)
    policy = make_policy()
    run = fit(
        tmp_path,
        policy=policy,
        objective=make_objective(support=support, terms=[kl]),
        rollout={"max_new_tokens": 4},
        module={"optimizer": plain(0.5)},
        callbacks=[Probe(on_train_batch_start=look)],
        max_steps=2,
    )
    experience, now_BTK, (own_BTK, reference_BTK) = looks[
        1
    ]  # the second rollout, from a policy that has moved
    rollout, mask_BT = experience.rollout, experience.rollout.response_mask_BT
    used = (
        mask_BT[..., None]
        if rollout.support_mask_BTK is None
        else mask_BT[..., None] & rollout.support_mask_BTK
    )
    used = used.expand_as(own_BTK)
    torch.testing.assert_close(now_BTK[used], own_BTK[used], rtol=0, atol=1e-4)
    divergence_BT = exact_on_support(own_BTK, reference_BTK, rollout.support_mask_BTK) * mask_BT
    assert divergence_BT.max() > 1e-3
    if place == "loss":
        torch.testing.assert_close(
            experience.reference_logits_BTK[used], reference_BTK[used], rtol=0, atol=1e-4
        )
        objective, denominators = (
            run.module.objective,
            run.module.objective.denominators(experience),
        )
        scores = replace(
            run.module.score(rollout, request=objective.request), support_logits_BTK=now_BTK
        )
        with_kl, _ = objective.loss(experience, scores, denominators)
        without, _ = replace(objective, terms=()).loss(experience, scores, denominators)
        mean = divergence_BT.sum() / mask_BT.sum()
        torch.testing.assert_close(with_kl - without, 0.5 * mean, rtol=1e-4, atol=1e-6)
    else:
        raw_B = experience.rewards_B + 0.5 * divergence_BT.sum(1)
        assert ((raw_B >= -1e-5) & (raw_B <= 1 + 1e-5)).all()  # what `Digits` gives lies in [0, 1]
        assert not torch.allclose(raw_B, experience.rewards_B)


def dense(module, rollout):
    """Return the stored support's logits of policy and reference, from plain forward passes of the whole network."""
    S, found = rollout.prompt_length, []
    for network in (module.policy.network, module.policy.reference_network):
        mask_BL = rollout.attention_mask_BL.long()
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits_BLV = network.eval()(rollout.tokens_BL, mask_BL, positions_BL).logits
        found.append(logits_BLV[:, S - 1 : -1].gather(2, rollout.support_BTK.long()))
    module.policy.network.train()
    return found


def test_the_exact_divergence_needs_a_support():
    with pytest.raises(UserError, match="`KLPenalty.estimator: exact` sums over a support"):
        make_objective(support=FullVocabulary(), terms=[KLPenalty(ConstantCoefficient(), "exact")])


def test_the_overlap_with_todays_choice_is_that_of_the_dense_logits(tmp_path):
    seen = []

    def look(trainer, module, outputs, batch, batch_idx):
        if batch["last_of_rollout"]:
            rollout = module.source.experience.rollout
            S = rollout.prompt_length
            mask_BL = rollout.attention_mask_BL.long()
            with torch.no_grad():
                logits = module.policy.network(
                    rollout.tokens_BL, mask_BL, (mask_BL.cumsum(1) - 1).clamp(min=0)
                ).logits
            today = logits[:, S - 1 : -1].topk(4).indices
            same = (
                (today[..., :, None] == rollout.support_BTK[..., None, :]).any(-1).float().mean(-1)
            )
            seen.append(same[rollout.response_mask_BT].mean().item())

    run = fit(
        tmp_path,
        objective=make_objective(support=TopK(4)),
        rollout={"minibatches": 2, "max_new_tokens": 4},
        module={"optimizer": plain(1.0)},
        callbacks=[SupportOverlap(every=1, rows=100), Probe(on_train_batch_end=look)],
        max_steps=4,
    )
    logged = {
        step: line["support/overlap"]
        for step, line in run.record.lines
        if "support/overlap" in line
    }
    assert [logged[1], logged[3]] == pytest.approx(
        seen, abs=1e-6
    )  # Lightning repeats the last value in between
    assert all(0.3 < overlap < 1 for overlap in seen)
    with pytest.raises(UserError, match="`SupportOverlap.every` must be"):
        SupportOverlap(every=0)
