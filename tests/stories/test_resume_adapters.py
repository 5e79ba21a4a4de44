"""Adapters are resumed exactly, and the reference stays the first policy."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.objective.kl import AdaptiveCoefficient, KLPenalty
from lightning_mpo.policies import CausalPolicy, Lora
from tests.support.epochs import lines
from tests.support.runs import adam, fit, make_objective, same, sgd


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_saved_alone_and_resumed_exactly(tmp_path, tiny_folder, dtype):
    def run(folder, steps, ckpt_path=None):
        policy = CausalPolicy(tiny_folder, lora=Lora(rank=2, alpha=4), dtype=dtype)
        with torch.random.fork_rng():
            torch.manual_seed(11 if ckpt_path is None else 12)  # other adapters to start from
            return fit(
                folder,
                policy=policy,
                rollout={"minibatches": 2},
                objective=make_objective(terms=[KLPenalty(AdaptiveCoefficient(target=0.01))]),
                callbacks=[ModelCheckpoint(dirpath=folder, save_last=True)],
                module={"optimizer": adam(1e-2)},
                max_steps=steps,
                ckpt_path=ckpt_path,
            )

    expected = run(tmp_path / "whole", 4)
    run(tmp_path, 3)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert len(state) == 2 * 2 * 7  # layers, A and B, linear layers
    assert all("lora_" in key and value.dtype == torch.float32 for key, value in state.items())
    resumed = run(tmp_path, 4, f"{tmp_path}/last.ckpt")
    assert same(resumed.weights, expected.weights)
    assert lines(resumed) == {3: lines(expected)[3]}
    moved = [name for name in expected.weights if "lora_B" in name and expected.weights[name].any()]
    assert len(moved) == 14, "adapters that never moved show nothing"


def test_the_reference_stays_the_first_policy_after_a_resume(tmp_path):
    """The reference is rebuilt from the source, not from the checkpoint."""
    objective = make_objective(terms=[KLPenalty(AdaptiveCoefficient(target=0.01))])
    first = fit(
        tmp_path, objective=objective, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)], max_steps=2,
        module={"optimizer": sgd(0.5)},
    )  # fmt: skip
    second = fit(
        tmp_path,
        objective=objective,
        ckpt_path=f"{tmp_path}/last.ckpt",
        max_steps=3,
        module={"optimizer": sgd(0.5)},
    )
    for (name, old), new in zip(
        first.module.policy.reference_network.named_parameters(),
        second.module.policy.reference_network.parameters(),
        strict=True,
    ):
        assert torch.equal(old, new), name
