"""Run by `test_heartbeat.py` on two processes: the reward function of one falls asleep in the second rollout.

python sleeping_reward.py FOLDER SECONDS ABORT_AFTER
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_mpo.callbacks import Heartbeat
from tests.support.runs import Digits, fit


class Sleepy(Digits):
    """Sleeps once, on rank 1."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.calls, self.seconds = 0, seconds

    def score(self, completions):
        self.calls += 1
        if self.calls == 2 and os.environ.get("LOCAL_RANK") == "1":
            time.sleep(self.seconds)
        return super().score(completions)


def main() -> None:
    folder, seconds, abort_after = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    patience = 0.0 if os.environ.get("LOCAL_RANK") == "1" else 60.0  # the sleeper gives up first
    watch = Heartbeat(warn_after=1.5, abort_after=abort_after + patience, every=0.25)
    run = fit(
        folder,
        rollout={"rewards": [Sleepy(seconds)]},
        callbacks=[watch],
        max_steps=3,
        devices=2,
        strategy="ddp",
    )
    (folder / f"done-{run.trainer.global_rank}").touch()


if __name__ == "__main__":
    main()
