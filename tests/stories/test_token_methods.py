"""Methods that choose, weigh or bound single tokens, through the whole training loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.objective.advantages import GroupRelative, PrefixTree
from lightning_mpo.objective.corrections import MaskedWeights, TruncatedWeights
from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.objective.position_clip import PositionClip
from lightning_mpo.objective.reductions import SequenceMean
from lightning_mpo.objective.selection import HighEntropyTokens, SampledTokens
from lightning_mpo.objective.supports import TopK
from lightning_mpo.objective.surrogates import AsymmetricRatio, BoundedTokens, PolicyGradient
from lightning_mpo.objective.terms import WeightPenalty
from lightning_mpo.objective.trace_actions import ForwardTraceActions, PrefixActions
from lightning_mpo.policies import Lora
from lightning_mpo.rewards.scoring import completions_of, score_all
from lightning_mpo.rollout.experience import build_experience
from tests.support.builders import seeded
from tests.support.runs import Probe, fit, make_objective, make_policy, same, sgd

METHODS = {
    "dppo": {"surrogate": DivergenceMask(delta=0.01), "advantage": GroupRelative("none")},
    "dppo on a support": {
        "surrogate": DivergenceMask(delta=0.01, divergence="kl"),
        "support": TopK(5),
    },
    "dppo over buckets": {
        "surrogate": DivergenceMask(delta=0.01, top_k=4),
        "advantage": GroupRelative("none"),
    },
    "dppo over buckets of a support": {
        "surrogate": DivergenceMask(delta=0.01, divergence="kl", top_k=6),
        "support": TopK(5, from_reference=True),
    },
    "gmpo": {
        "surrogate": BoundedTokens(0.02, 0.02),
        "actions": SequenceActions(),
        "reduction": SequenceMean(),
    },
    "aspo by entropy": {"surrogate": AsymmetricRatio(wide=0.4)},
    "s_grpo": {
        "surrogate": PolicyGradient(),
        "selection": SampledTokens(1, 3, 0.5),
        "reduction": SequenceMean(),
    },
    "s_grpo, unbiased": {
        "surrogate": PolicyGradient(),
        "selection": SampledTokens(1, None, 0.5, unbiased=True),
    },
    "t_spmo": {
        "surrogate": PolicyGradient(),
        "advantage": PrefixTree(),
        "terms": [WeightPenalty(1e-3)],
    },
    "high entropy": {"selection": HighEntropyTokens(0.3)},
    "ctpo": {"surrogate": PositionClip(), "actions": PrefixActions()},
    "nfpo": {"actions": ForwardTraceActions(3)},
}


@pytest.mark.parametrize("name", METHODS)
def test_each_trains_through_several_updates_of_a_rollout(tmp_path, name):
    run = fit(
        tmp_path, objective=make_objective(**METHODS[name]), rollout={"minibatches": 2, "epochs": 2}
    )
    still = fit(tmp_path / "still", objective=make_objective(**METHODS[name]), max_steps=0)
    assert not same(run.weights, still.weights)
    assert all(torch.isfinite(weight).all() for weight in run.weights.values())
    losses = run.record.column("loss/surrogate")
    assert len(losses) == 4
    assert all(map(torch.isfinite, torch.tensor(losses)))
    on_policy = run.record.column("ratio/mean")[0]
    assert on_policy == pytest.approx(1.0, abs=1e-4)


def test_dppo_is_anchored_at_what_the_sampler_recorded(tmp_path):
    seen = []
    probe = Probe(
        on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"])
    )
    fit(
        tmp_path,
        objective=make_objective(surrogate=DivergenceMask()),
        callbacks=[probe],
        max_steps=1,
    )
    assert torch.equal(seen[0].old_logprobs_BT, seen[0].rollout.behaviour_logprobs_BT)


def test_only_chosen_tokens_are_scored(tmp_path):
    seen = []
    probe = Probe(
        on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"])
    )
    objective = make_objective(selection=SampledTokens(1, 2, 1.0))
    fit(tmp_path, objective=objective, callbacks=[probe], max_steps=2)
    for part in seen:
        assert (part.mask_BT.sum(1) <= 2).all()
        assert (part.whole_mask_BT.sum(1) > 2).any()


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_weight_penalty_adds_twice_its_coefficient_times_the_adapters(tmp_path, micro_batches):
    """With all rewards equal nothing else has a gradient."""
    from lightning_mpo.rewards.base import Reward

    class Same(Reward):
        def score(self, completions):
            return [1.0] * len(completions)

    gradients = {}

    def look(trainer, module, optimizer):
        trained = {n: p for n, p in module.policy.named_parameters() if p.requires_grad}
        gradients.update({n: p.grad.clone() for n, p in trained.items()})
        gradients["weights"] = {n: p.detach().clone() for n, p in trained.items()}

    policy = make_policy()
    policy.lora = Lora(rank=4)
    fit(
        tmp_path,
        rollout={"rewards": [Same()]},
        objective=make_objective(terms=[WeightPenalty(0.3)]),
        callbacks=[Probe(on_before_optimizer_step=look)],
        max_steps=1,
        accumulate_grad_batches=micro_batches,
        policy=policy,
    )
    weights = gradients.pop("weights")
    assert weights
    assert all("lora_" in name for name in weights)
    assert any(weight.any() for weight in weights.values())
    for name, weight in weights.items():
        torch.testing.assert_close(gradients[name], 0.6 * weight, rtol=1e-4, atol=1e-7)


def test_a_penalty_without_adapters_is_told_and_changes_nothing(tmp_path):
    with pytest.warns(
        UserWarning, match="holds adapters small and the policy has none; give `policy.lora`"
    ):
        run = fit(tmp_path, objective=make_objective(terms=[WeightPenalty(10.0)]), max_steps=2)
    assert same(run.weights, fit(tmp_path / "plain", max_steps=2).weights)


class Warned:
    """Collects what a run warns of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        monkeypatch.setattr(
            "lightning_mpo.modules.rollout_setup.rank_zero_warn",
            lambda text, **_: self.said.append(text),
        )


@pytest.mark.parametrize(
    ("surrogate", "plan", "times"),
    [
        (PolicyGradient(), {}, 0),
        (PolicyGradient(), {"minibatches": 2}, 1),
        (PolicyGradient(), {"epochs": 2}, 1),
        (DivergenceMask(), {"minibatches": 2, "epochs": 2}, 0),
    ],
)
def test_several_updates_of_an_on_policy_loss_are_warned_of_once(
    tmp_path, monkeypatch, surrogate, plan, times
):
    warned = Warned(monkeypatch)
    fit(tmp_path, objective=make_objective(surrogate=surrogate), rollout=plan, max_steps=5)
    assert len(warned.said) == times
    for text in warned.said:
        assert text.startswith(
            "`PolicyGradient` is meant for one update per rollout, and there are 2"
        )
        assert "`rollout.minibatches` and `rollout.epochs` to 1" in text


def test_the_tokens_of_highest_entropy_are_those_of_a_sort(tmp_path):
    seen = []
    probe = Probe(
        on_train_batch_start=lambda trainer, module, batch, i: seen.append(
            (module, module.source.experience)
        )
    )
    objective = make_objective(selection=HighEntropyTokens(0.3))
    run = fit(
        tmp_path, objective=objective, callbacks=[probe], max_steps=1, module={"optimizer": frozen}
    )
    experience = seen[0][1]
    entropy_BT, mask_BT = run.module.score(experience.rollout).entropy_BT, experience.whole_mask_BT
    for entropy, mask, weights in zip(
        entropy_BT, mask_BT, experience.token_weights_BT, strict=True
    ):
        places = mask.nonzero()[:, 0].tolist()
        count = math.ceil(0.3 * len(places) - 1e-9)
        wanted = sorted(places, key=lambda t, row=entropy: -row[t].item())[:count]
        assert weights.nonzero()[:, 0].tolist() == sorted(wanted)


def frozen(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(
    "correction",
    [TruncatedWeights("token", 1.2), MaskedWeights("sequence", 1.2)],
    ids=["token", "sequence"],
)
def test_what_the_sampler_recorded_wrongly_is_weighed(tmp_path, correction, updates):
    run = fit(
        tmp_path,
        objective=make_objective(correction=correction),
        max_steps=1,
        module={"optimizer": frozen},
    )
    rollout = run.rollout.experience.rollout
    scores = score_all(run.rollout.rewards, completions_of(rollout))
    gaps = 0.3 * torch.randn(rollout.response_mask_BT.shape, generator=seeded(1))
    off = replace(
        rollout,
        behaviour_logprobs_BT=rollout.behaviour_logprobs_BT - gaps * rollout.response_mask_BT,
    )

    def weigh(given):
        return build_experience(
            run.module.scorer(),
            run.module.objective,
            given,
            scores,
            seeded(0),
            updates=updates,
            reference=False,
        )

    plain, weighed = weigh(rollout), weigh(off)
    torch.testing.assert_close(plain.correction_BT, torch.ones_like(gaps), rtol=0, atol=1e-4)
    for b, mask in enumerate(rollout.response_mask_BT):
        logs = gaps[b][mask].tolist()
        for t, log in zip(mask.nonzero()[:, 0].tolist(), logs, strict=True):
            ratio = math.exp(sum(logs) if correction.level == "sequence" else log)
            bound = min(ratio, 1.2) if correction.level == "token" else ratio * (ratio <= 1.2)
            assert weighed.correction_BT[b, t].item() == pytest.approx(bound, abs=1e-3)
    before, after = (run.module.objective.denominators(part) for part in (plain, weighed))
    assert torch.equal(before.actions, after.actions)
    assert torch.equal(before.tokens, after.tokens)


def test_how_far_the_policy_moved_is_logged_with_each_update(tmp_path):
    objective = make_objective(surrogate=DivergenceMask(delta=0.01, top_k=4))
    record = fit(
        tmp_path,
        objective=objective,
        rollout={"minibatches": 2, "epochs": 2},
        module={"optimizer": sgd(0.5)},
    ).record
    moved = record.column("trust/divergence")
    assert moved[0] == pytest.approx(0, abs=1e-6)
    assert moved[2] > 1e-4
    for name in ("trust/masked_good", "trust/masked_bad", "trust/capped"):
        assert len(record.column(name)) == 4
        assert all(0 <= value <= 1 for value in record.column(name))
    assert record.column("trust/masked_good")[3] + record.column("trust/masked_bad")[3] > 0
