"""Run by `test_parallel.py`: gradients of every reduction on one process, and on two under DDP and FSDP2.

`python many_ranks.py FOLDER STRATEGY [NODES]`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_mpo.objective.advantages import GeneralizedAdvantage, GroupRelative
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.supports import TopK
from lightning_mpo.objective.terms import EntropyBonus, HeadUpkeep
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.policies import (
    ParallelHeads,
    SeparateCritic,
    SequentialHeads,
    TinyPolicy,
    ValueHead,
)
from tests.support.runs import ByPrompt, Probe, fit, make_objective, make_policy, sgd

BLOCKS = BlockActions(FutureShare(0.2), length=3, source="mtp")
KL = KLPenalty(ConstantCoefficient(0.3))
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tokens": ({"reduction": TokenMean(), "terms": [EntropyBonus(0.01)]}, {}),
    "sequences": ({"reduction": SequenceMean(), "support": TopK(6)}, {}),
    "constant": ({"reduction": ConstantLength(16), "advantage": GroupRelative("batch")}, {}),
    "kl": ({"reduction": TokenMean(), "terms": [KL], "support": TopK(6, from_reference=True)}, {}),
    "heads": (
        {"reduction": SequenceMean(), "actions": BLOCKS, "terms": [HeadUpkeep(0.1)]},
        {"mtp": ParallelHeads},
    ),
    "chain": (
        {"reduction": TokenMean(), "actions": BLOCKS, "terms": [HeadUpkeep(0.1)]},
        {"mtp": SequentialHeads},
    ),
    "ppo": (
        {"advantage": GeneralizedAdvantage(whiten=True), "terms": [ValueLoss(0.5, 0.2)]},
        {"critic": ValueHead},
    ),
    "critic": (
        {"advantage": GeneralizedAdvantage(whiten=True), "terms": [ValueLoss(0.5)]},
        {"critic": SeparateCritic},
    ),
}
"""Axes of the objective, and parts of the policy."""


def double(policy: TinyPolicy, **attributes: Any) -> TinyPolicy:
    """Compute in float64."""
    load = policy.load_network
    policy.load_network = lambda: load().double()
    for name, value in attributes.items():
        setattr(policy, name, value)
    return policy


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def strategy_of(name: str, processes: int) -> dict[str, Any]:
    """Return the trainer's strategy, by a short name."""
    if name == "one":
        return {}
    fsdp = ModelParallelStrategy(processes, 1, save_distributed_checkpoint=name == "folder")
    return {"devices": processes, "strategy": "ddp" if name == "ddp" else fsdp}


def gradients(folder: Path, case: str, strategy: str = "one", **trainer: Any) -> dict[str, Any]:
    """Train for four updates, two rollouts of two passes each; return each update's gradients and what was logged."""
    axes, parts = CASES[case]
    found: list[dict[str, Tensor]] = []

    def look(trainer, module, optimizer):
        found.append(
            {n: whole(w.grad) for n, w in module.policy.named_parameters() if w.grad is not None}
        )

    torch.manual_seed(0)  # of heads
    policy = double(make_policy(**{name: kind() for name, kind in parts.items()}))
    policy.gather_rollouts = strategy != "step"
    run = fit(
        folder,
        rollout={"sampler": ByPrompt(), "epochs": 2, "max_new_tokens": 16},
        policy=policy,
        objective=make_objective(**axes),
        module={
            "optimizer": sgd(0.05),
            "learning_rates": {"critic": 0.1} if "critic" in parts else {},
        },
        accumulate_grad_batches=2,
        max_steps=4,
        gradient_clip_val=0.5,
        callbacks=[Probe(on_before_optimizer_step=look)],
        **(strategy_of(strategy, 2) | trainer),
    )
    return {
        "gradients": found,
        "logged": run.record.without_clocks(),
        "rank": run.trainer.global_rank,
    }


def main() -> None:
    folder, strategy, *nodes = Path(sys.argv[1]), *sys.argv[2:]
    trainer = {"devices": 1, "num_nodes": int(nodes[0])} if nodes else {}
    said = {
        case: gradients(folder, case, strategy, **trainer)
        for case in (["tokens", "ppo"] if nodes else CASES)
    }
    torch.save(said, folder / f"{strategy}-{said['tokens']['rank']}.pt")


if __name__ == "__main__":
    main()
