"""Run by `test_curriculum.py` on two processes: counts of a curriculum, and a resume with them.

python two_ranks_curriculum.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning.pytorch.callbacks import ModelCheckpoint

from tests.support.curricula import counted, still


def main() -> None:
    folder = Path(sys.argv[1])
    rank = int(os.environ.get("LOCAL_RANK", 0))
    whole = still(folder / "whole", devices=2)
    save = ModelCheckpoint(dirpath=folder, save_last=True)
    still(folder, devices=2, max_steps=5, callbacks=[save])
    resumed = still(folder, devices=2, ckpt_path=str(folder / "last.ckpt"))
    off = max(
        (resumed.weights[name] - whole.weights[name]).abs().max().item() for name in whole.weights
    )
    result = {"counts": counted(whole).tolist(), "resumed": counted(resumed).tolist(), "off": off}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
