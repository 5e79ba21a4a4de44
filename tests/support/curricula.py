"""Runs with a curriculum by success rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_mpo.data import SuccessRate
from tests.support import dynamic
from tests.support.runs import ByPrompt, Run, make_data, sgd


def train(folder: Path, *, train_problems: int = 12, **options: Any) -> tuple[Run, dynamic.Watch]:
    """Train on 12 rows, from which 4 are drawn for each rollout."""
    data = make_data(train_problems=train_problems, curriculum=SuccessRate(floor=0.05, memory=1000))
    return dynamic.train(folder, rounds=None, data=data, **options)


def counted(run: Run) -> Tensor:
    """Return right and judged completions of each row."""
    datamodule: Any = run.trainer.datamodule
    return datamodule.curriculum.state_dict()["counts"]


def still(folder: Path, devices: int, **options: Any) -> Run:
    """Run eight rollouts without learning, whose samples do not depend on the number of processes."""
    plan = {"sampler": ByPrompt(), "max_new_tokens": 16}
    return train(
        folder,
        rollout=plan,
        module={"optimizer": sgd(0.0)},
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        **{"max_steps": 8} | options,
    )[0]
