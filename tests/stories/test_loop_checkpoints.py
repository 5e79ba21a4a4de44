"""Checkpoints and stops fall between updates, and hold no reference."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from tests.support.runs import Probe, adam, fit, make_objective, same


def test_checkpoints_of_every_n_train_steps_are_of_those_updates(tmp_path):
    weights = {}
    keep = Probe(
        on_train_batch_end=lambda trainer, module, outputs, batch, i: weights.setdefault(
            trainer.global_step,
            {k: w.detach().clone() for k, w in module.policy.named_parameters()},
        )
    )
    save = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1
    )
    fit(
        tmp_path,
        rollout={"minibatches": 4},
        accumulate_grad_batches=2,
        max_steps=10,
        callbacks=[keep, save],
    )
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {
        "step=3.ckpt",
        "step=6.ckpt",
        "step=9.ckpt",
    }
    for step in (3, 6, 9):
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert state["global_step"] == step
        ready = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert ready == 2 * step, "saved after an optimiser step"
        assert same({k: state["state_dict"][f"policy.{k}"] for k in weights[step]}, weights[step])


@pytest.mark.parametrize("slot", [0, 1, 2, 3])
def test_a_stop_within_an_update_waits_for_its_end(tmp_path, slot):
    """`Timer`, `KLTracking` and others set `should_stop` in any slot; half an update's gradient is in no checkpoint."""

    def stop(trainer, module, outputs, batch, batch_idx):
        trainer.should_stop |= batch_idx == slot

    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    run = fit(
        tmp_path,
        rollout={"minibatches": 2},
        accumulate_grad_batches=4,
        max_steps=8,
        callbacks=[Probe(on_train_batch_end=stop), save],
    )
    assert run.trainer.global_step == 1
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 4


def test_the_reference_is_in_no_checkpoint(tmp_path):
    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    objective = make_objective(terms=[KLPenalty(ConstantCoefficient(0.1))])
    run = fit(
        tmp_path,
        objective=objective,
        callbacks=[save],
        max_steps=2,
        module={"optimizer": adam(1e-2)},
    )
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {
        f"policy.network.{key}" for key in run.module.policy.network.state_dict()
    }
    name = "model.layers.0.mlp.up_proj.weight"
    reference = run.module.policy.reference_network.state_dict()[name]
    assert torch.equal(
        state[f"policy.network.{name}"], run.module.policy.network.state_dict()[name]
    )
    assert not torch.equal(state[f"policy.network.{name}"], reference)
    assert all("reference" not in key for key in state)
