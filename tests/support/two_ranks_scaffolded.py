"""Run by `test_scaffold_runs.py`: training on scaffolds, on one process and on two.

python two_ranks_scaffolded.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from zlib import crc32

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from lightning_mpo.data import Delimiters, Scaffolded
from lightning_mpo.rollout import join_rollouts
from lightning_mpo.sampling import LocalSampler
from lightning_mpo.types import PromptBatch
from tests.support.runs import Digits, Run, fit, make_data, sgd


class ByText(LocalSampler):
    """Draws each prompt's completions from a generator of its text, whatever pads it to the width of a batch."""

    def sample(self, policy, prompts, completions, request, *, generator, **options):
        parts = []
        for p, row in enumerate(prompts.rows):
            one = PromptBatch(
                prompts.input_ids_PS[p : p + 1],
                prompts.attention_mask_PS[p : p + 1],
                prompts.rows[p : p + 1],
            )
            seed = torch.Generator().manual_seed(crc32((row.prompt + row.opening).encode()))
            parts.append(
                super().sample(policy, one, completions, request, generator=seed, **options)
            )
        return join_rollouts(parts)


class FewLow(Digits):
    """Right where more than half of the characters are digits below 5, so that some groups are flat."""

    is_accuracy = True

    def score(self, completions):
        return [float((share or 0.0) > 0.5) for share in super().score(completions)]


def train(folder: Path, devices: int = 1, **options: object) -> Run:
    """Train on 12 problems at three levels, with two updates on each rollout of 4 prompts."""
    rollout = {"sampler": ByText(), "rewards": [FewLow()], "epochs": 2}
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
