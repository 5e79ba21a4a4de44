"""Reinforcement learning of masked policies: a run that was stopped anywhere goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import KLTracking
from lightning_mpo.objective.likelihoods import CoupledElbo, Denoising, Elbo
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies import TinyMaskedPolicy
from lightning_mpo.rollout.evaluation import divergence_of
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.sampling import SamplingRequest
from lightning_mpo.sampling.diffusion import DiffusionSampler
from tests.support.builders import make_prompts, seeded
from tests.support.epochs import lines
from tests.support.runs import Run, adam, fit, make_policy, same

LAST = 9
"""Updates of a whole run: four of a rollout, in two passes with noise of their own."""
METHODS = {
    "espo": {"likelihood": CoupledElbo(pairs=2)},
    "bgpo": {"likelihood": Elbo(samples=3)},
    "agrpo": {"likelihood": Denoising(steps=2, importance="entropy")},
}


def train(folder, method, steps, *, save=None, ckpt_path=None) -> Run:
    return fit(
        folder,
        policy=make_policy(TinyMaskedPolicy),
        objective=replace(Objective.from_file(method), **METHODS[method]),
        rollout={
            "sampler": DiffusionSampler(block=4, tokens_per_step=2),
            "minibatches": 2,
            "epochs": 2,
        },
        module={"optimizer": adam(3e-3)},
        callbacks=[KLTracking(), *([save] if save else [])],
        accumulate_grad_batches=2,
        max_steps=steps,
        gradient_clip_val=1.0,
        ckpt_path=ckpt_path,
    )


@pytest.mark.parametrize(
    "method", [m if m == "agrpo" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, method):
    """In the first pass over a rollout (1), in the second (3), between rollouts (4), in the second one (5)."""
    save = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    whole = train(tmp_path / "whole", method, LAST, save=save)
    start = make_policy(TinyMaskedPolicy)
    start.build(device=torch.device("cpu"), reference=False)
    assert not same(whole.weights, dict(start.named_parameters())), "nothing was learnt"
    for at in (1, 3, 4, 5):
        torch.manual_seed(at)  # other random numbers than those that are restored
        resumed = train(tmp_path / f"{at}", method, LAST, ckpt_path=f"{tmp_path}/step={at}.ckpt")
        assert same(resumed.weights, whole.weights), at
        expected = {step: line for step, line in lines(whole).items() if step >= at}
        assert lines(resumed) == expected


def test_the_divergence_of_an_evaluation_is_in_the_states_of_the_sampler():
    policy = make_policy(TinyMaskedPolicy)
    policy.build(device=torch.device("cpu"), reference=True)
    rollout = DiffusionSampler(block=4, tokens_per_step=2).sample(
        policy,
        make_prompts([4, 6]),
        3,
        SamplingRequest(FullVocabulary(), 1.0, 8),
        generator=seeded(0),
    )
    total, tokens = divergence_of(Scorer(policy), rollout)
    assert tokens == rollout.response_mask_BT.sum()
    assert total == 0.0
    with torch.no_grad():
        for weight in (weight for weight in policy.parameters() if weight.requires_grad):
            weight.mul_(1.05)
    total, _ = divergence_of(Scorer(policy), rollout)
    assert total > 1e-4
