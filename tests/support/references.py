"""Runs whose reference moves, and the reference at their end."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.policies import Lora
from tests.support.runs import Run, adam, fit, make_objective

LORA = Lora(rank=2, alpha=4)


def run(folder, policy, update, *, updates=5, callbacks=(), objective=None, **options) -> Run:
    torch.manual_seed(
        7 if options.get("ckpt_path") is None else 8
    )  # of the adapters, which a resume has to find again
    callbacks = [*callbacks, *([update] if update else [])]
    penalised = make_objective(terms=[KLPenalty(ConstantCoefficient(0.2))])
    module = {"optimizer": adam(1e-2)}
    return fit(
        folder, policy=policy, objective=objective or penalised, callbacks=callbacks, max_steps=updates, module=module,
        **options,
    )  # fmt: skip


def reference_of(run: Run) -> dict[str, torch.Tensor]:
    """Return the weights that a score of the reference computes with: adapters, or all of a copy."""
    policy = run.module.policy
    with policy.as_reference():
        weights = dict(policy.reference.network.named_parameters())
        return {
            n: w.detach().clone() for n, w in weights.items() if policy.lora is None or "lora_" in n
        }


def _saving(folder) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
