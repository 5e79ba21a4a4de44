"""Run by `test_resume_ddp.py`: two processes that train together, one of which may be killed.

python two_ranks_killed.py FOLDER PHASE COUNT RANK STRATEGY      PHASE "none": nobody; goes on from FOLDER's last checkpoint
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import ExactResume, KillAt, KLTracking, Preemption, PromptOrder
from lightning_mpo.objective.kl import AdaptiveCoefficient, KLPenalty
from lightning_mpo.objective.supports import TopK
from lightning_mpo.resume.metrics_csv import MetricsCSV
from lightning_mpo.storage import locate
from tests.support.many_ranks import strategy_of
from tests.support.runs import Probe, adam, fit, make_objective


def main() -> None:
    folder, phase, count, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    last = locate(folder / "checkpoints" / "last.ckpt")
    resume = last.exists()
    mine = int(os.environ.get("LOCAL_RANK", 0))

    def draw(trainer, module, batch, batch_idx):
        """Let the weights depend on random numbers that each process draws for itself."""
        batch["micro_batch"].advantages_BT.mul_(0.5 + torch.rand(()))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(mine + (10 if resume else 0))
    killer = [KillAt(phase, count, rank)] if phase != "none" else []  # type: ignore[arg-type]
    save = ModelCheckpoint(
        folder / "checkpoints", save_last=True, every_n_train_steps=2, enable_version_counter=False
    )
    fit(
        folder,
        rollout={"minibatches": 2},
        objective=make_objective(
            support=TopK(6), terms=[KLPenalty(AdaptiveCoefficient(0.01, horizon=16))]
        ),
        module={"optimizer": adam(3e-3)},
        callbacks=[
            KLTracking(),
            PromptOrder(),
            ExactResume(),
            Preemption(),
            *killer,
            Probe(on_train_batch_start=draw),
            save,
        ],
        logger=MetricsCSV(folder, name="", version=""),
        first=True,
        accumulate_grad_batches=2,
        max_steps=7,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        ckpt_path=str(last) if resume else None,
        **strategy_of(sys.argv[5], 2),
    )


if __name__ == "__main__":
    main()
