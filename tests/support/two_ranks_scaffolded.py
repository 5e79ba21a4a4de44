"""Run by `test_scaffold_runs.py`: training on scaffolds, on one process and on two.

python two_ranks_scaffolded.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from lightning_mpo.data import Delimiters, Scaffolded
from tests.support.runs import ByPrompt, Digits, Run, fit, make_data, sgd


class FewLow(Digits):
    """Right where more than half of the characters are digits below 5, so that some groups are flat."""

    is_accuracy = True

    def score(self, completions):
        return [float((share or 0.0) > 0.5) for share in super().score(completions)]


def train(folder: Path, devices: int = 1, **options: object) -> Run:
    """Train on 12 problems at three levels: 9 rollouts an epoch, two updates on each."""
    rollout = {"sampler": ByPrompt(), "rewards": [FewLow()], "minibatches": 2}
    defaults = {
        "rollout": rollout,
        "data": Scaffolded(make_data(digits=2), splitter=Delimiters(",;")),
        "module": {"optimizer": sgd(0.05)},
        "max_steps": 8,
        "devices": devices,
        "strategy": "ddp" if devices > 1 else "auto",
    }
    return fit(folder, **(defaults | options))  # type: ignore[arg-type]


def main() -> None:
    folder = Path(sys.argv[1])
    rank = int(os.environ.get("LOCAL_RANK", 0))
    run = train(folder, devices=2)
    torch.save(run.weights, folder / f"weights-{rank}.pt")
    (folder / f"lines-{rank}.json").write_text(json.dumps(run.record.without_clocks()))


if __name__ == "__main__":
    main()
