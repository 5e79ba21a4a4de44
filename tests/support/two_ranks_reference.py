"""Run by `test_reference_ddp.py`: a reference that moves, on one process and on two, and what a resume has of it.

python two_ranks_reference.py FOLDER MODEL
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mpo.callbacks import ExactResume, ReferenceUpdate
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.policies import CausalPolicy, Lora
from tests.support.many_ranks import double, strategy_of
from tests.support.runs import ByPrompt, Probe, adam, fit, make_objective, make_policy

KINDS = ("copy", "lora")
Weights = dict[str, Tensor]


def train(
    folder: Path, model: str, kind: str, strategy: str = "one", at: int | None = None
) -> dict[str, Weights]:
    """Train for five rollouts of an update each, in float64; the reference moves before the third and the fifth.

    Args:
        folder: of the checkpoints.
        model: the base of adapters.
        kind: one of `KINDS`.
        strategy: of `strategy_of`.
        at: the update to go on behind.

    Returns:
        The policy and its reference at the end, and the reference as training began, where there is one yet.
    """
    began: Weights = {}

    def look(trainer, module):
        if at is not None:  # before it moved, asking for the reference of adapters would make it
            began.update(
                {name: weight.clone() for name, weight in module.policy.reference.state().items()}
            )

    torch.manual_seed(
        int(os.environ.get("LOCAL_RANK", 0)) + (10 if at else 0)
    )  # of the adapters: DDP takes rank 0's
    policy = make_policy() if kind == "copy" else CausalPolicy(model, lora=Lora(rank=2, alpha=4))
    save = ModelCheckpoint(folder, f"{kind}-{{step}}", every_n_train_steps=1, save_top_k=-1)
    done = fit(
        folder,
        rollout={"sampler": ByPrompt()},
        policy=double(policy),
        objective=make_objective(terms=[KLPenalty(ConstantCoefficient(0.2))]),
        module={"optimizer": adam(1e-2)},
        callbacks=[
            ReferenceUpdate(every=2, mixup=0.5),
            ExactResume(),
            Probe(on_train_start=look),
            save,
        ],
        max_steps=5,
        ckpt_path=None if at is None else f"{folder}/{kind}-step={at}.ckpt",
        **strategy_of(strategy, 2),
    )
    return {
        "policy": done.weights,
        "reference": done.module.policy.reference.state(),
        "began": began,
    }


def main() -> None:
    folder, model = Path(sys.argv[1]), sys.argv[2]
    said = {kind: {at: train(folder, model, kind, "ddp", at) for at in (None, 3)} for kind in KINDS}
    torch.save(said, folder / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    main()
