"""Two equal runs are equal bit for bit, however many threads there are."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mpo.objective.advantages import GeneralizedAdvantage
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.supports import TopK
from lightning_mpo.objective.terms import HeadUpkeep
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.policies import ParallelHeads, SeparateCritic, SequentialHeads, ValueHead
from tests.support.runs import fit, make_data, make_objective, make_policy

BLOCKS = {
    "actions": BlockActions(FutureShare(0.2), length=3, source="mtp"),
    "terms": [HeadUpkeep(0.1)],
}
VALUES = {"advantage": GeneralizedAdvantage(), "terms": [ValueLoss()]}
OBJECTIVES = {
    "tokens": ({}, {}),
    "support": ({"support": TopK(6), "terms": [KLPenalty(ConstantCoefficient(0.1), "exact")]}, {}),
    "candidates": ({"surrogate": DivergenceMask(delta=0.1, top_k=4)}, {}),
    "blocks and a value head": (
        BLOCKS | VALUES | {"terms": [HeadUpkeep(0.1), ValueLoss()]},
        {"mtp": ParallelHeads(offsets=2), "critic": ValueHead()},
    ),
    "blocks in a chain": (BLOCKS, {"mtp": SequentialHeads(offsets=2)}),
    "a critic of its own": (VALUES, {"critic": SeparateCritic(width=8)}),
}


class Places(TorchDispatchMode):
    """Keeps the operations that add several numbers to one place in the order in which threads come to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.unordered: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.seen += "index_select" in name
        if "index_put" in name and args[2].is_floating_point() and (args[3:] and args[3]):
            place = torch.stack(
                torch.broadcast_tensors(*(i for i in args[1] if i is not None))
            ).flatten(1)
            if place.dtype != torch.bool and place.unique(dim=1).shape[1] < place.shape[1]:
                self.unordered.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_sum_depends_on_which_thread_comes_first(tmp_path, name):
    """`x[index]` has such a gradient from 32,768 numbers on; responses to one prompt use its last state."""
    axes, parts = OBJECTIVES[name]
    policy = make_policy(**parts)
    with Places() as places:
        fit(
            tmp_path,
            objective=make_objective(**axes),
            policy=policy,
            data=make_data(digits=2),
            rollout={"max_new_tokens": 4},
            max_steps=1,
        )
    assert places.seen
    assert places.unordered == []
