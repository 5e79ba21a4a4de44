"""Run by `test_failing_ddp.py`: rewards that fail on one of two processes, in each place where rewards are called.

python two_ranks_failing.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Reward
from lightning_mpo.rollout import DynamicSampling
from tests.support.runs import fit, make_data

RANK = int(os.environ.get("LOCAL_RANK", 0))


class Fails(Reward):
    """Judges by length, and raises in one call on one rank.

    Args:
        rank: where it raises.
        call: which of its calls does.
    """

    is_accuracy = True

    def __init__(self, rank: int = 9, call: int = 1) -> None:
        super().__init__()
        self.rank, self.call, self.calls = rank, call, 0

    def score(self, completions):
        self.calls += 1
        if self.rank == RANK and self.calls >= self.call:
            raise ValueError(f"on {RANK}")
        return [float(i % 2) for i in range(len(completions))]


def ended(run: Callable[[], object]) -> str:
    """Return the line that a run ends with."""
    try:
        run()
    except UserError as error:
        return f"{error} {error.everywhere}"
    return "no error"


def main() -> None:
    folder = Path(sys.argv[1])
    two = {"devices": 2, "strategy": "ddp"}
    held_out = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}

    def options(reward: Reward, **more: object) -> dict[str, object]:
        return {"rollout": {"rewards": [reward], **more}, **two}

    lines = {
        "none": ended(lambda: fit(folder, **options(Fails()), **held_out)),
        "second process": ended(lambda: fit(folder, **options(Fails(1, 1)))),
        "second rollout": ended(lambda: fit(folder, **options(Fails(1, 2)))),
        "first process": ended(lambda: fit(folder, **options(Fails(0, 1)))),
        "dynamic": ended(lambda: fit(folder, **options(Fails(1, 1), dynamic=DynamicSampling(2)))),
        "validation": ended(
            lambda: fit(folder, **options(Fails(1, 3)), **held_out, data=make_data())
        ),
    }
    (folder / f"lines{RANK}.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    main()
