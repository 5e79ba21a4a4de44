"""Methods that choose, weigh or bound single tokens, through the whole training loop."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.action_spaces import SequenceActions
from lightning_mpo.advantages import GroupRelative, PrefixTree
from lightning_mpo.policies import Lora
from lightning_mpo.reductions import SequenceMean
from lightning_mpo.selection import HighEntropyTokens, SampledTokens
from lightning_mpo.supports import TopK
from lightning_mpo.surrogates import AsymmetricRatio, BoundedTokens, DivergenceMask, PolicyGradient
from lightning_mpo.terms import WeightPenalty
from tests.modules.runs import Probe, fit, make_objective, make_policy, same

METHODS = {
    "dppo": {"surrogate": DivergenceMask(delta=0.01), "advantage": GroupRelative("none")},
    "dppo on a support": {"surrogate": DivergenceMask(delta=0.01, divergence="kl"), "support": TopK(5)},
    "gmpo": {"surrogate": BoundedTokens(0.02, 0.02), "actions": SequenceActions(), "reduction": SequenceMean()},
    "aspo by entropy": {"surrogate": AsymmetricRatio(wide=0.4)},
    "s_grpo": {"surrogate": PolicyGradient(), "selection": SampledTokens(1, 3, 0.5), "reduction": SequenceMean()},
    "s_grpo, unbiased": {"surrogate": PolicyGradient(), "selection": SampledTokens(1, None, 0.5, unbiased=True)},
    "t_spmo": {"surrogate": PolicyGradient(), "advantage": PrefixTree(), "penalty": WeightPenalty(1e-3)},
    "high entropy": {"selection": HighEntropyTokens(0.3)},
}


@pytest.mark.parametrize("name", METHODS)
def test_each_trains_through_several_updates_of_a_rollout(tmp_path, name):
    run = fit(tmp_path, objective=make_objective(**METHODS[name]), rollout={"minibatches": 2, "epochs": 2})
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
    probe = Probe(on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"]))
    fit(tmp_path, objective=make_objective(surrogate=DivergenceMask()), callbacks=[probe], max_steps=1)
    assert torch.equal(seen[0].old_logprobs_BT, seen[0].rollout.behaviour_logprobs_BT)


def test_only_chosen_tokens_are_scored(tmp_path):
    seen = []
    probe = Probe(on_train_batch_start=lambda trainer, module, batch, i: seen.append(batch["micro_batch"]))
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
        objective=make_objective(penalty=WeightPenalty(0.3)),
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
    with pytest.warns(UserWarning, match="holds adapters small and the policy has none; give `policy.lora`"):
        run = fit(tmp_path, objective=make_objective(penalty=WeightPenalty(10.0)), max_steps=2)
    assert same(run.weights, fit(tmp_path / "plain", max_steps=2).weights)
