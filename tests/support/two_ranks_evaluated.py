"""Run by `test_evaluation_ddp.py`: a validation on two processes.

python two_ranks_evaluated.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_mpo.callbacks import HeldOutAnswers, RolloutLoop
from lightning_mpo.modules import PolicyOptimization
from tests.support.runs import Digits, make_data, make_objective, make_policy, make_trainer


class Low(Digits):
    """Right with a digit below 5 at the beginning."""

    is_accuracy = True

    def score(self, completions):
        return [float(done.text[:1] in ("0", "1", "2", "3", "4")) for done in completions]


def validate(folder: Path, devices: int) -> dict[str, float]:
    """Return the metrics of a validation of five problems in batches of two."""
    loop = RolloutLoop(
        [Low()], max_new_tokens=8, seed=1, validation_completions=3, validation_ks=[1, 3]
    )
    machine = make_trainer(
        folder,
        [loop, HeldOutAnswers()],
        limit_val_batches=1.0,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
    )
    (metrics,) = machine.validate(
        PolicyOptimization(make_policy(), make_objective()),
        datamodule=make_data(held_out_problems=5, held_out_share=0.3, validation_batch_size=2),
    )
    return dict(metrics)


if __name__ == "__main__":
    metrics = validate(Path(sys.argv[1]), 2)
    (Path(sys.argv[1]) / "metrics.json").write_text(json.dumps(metrics))
