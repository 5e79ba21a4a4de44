"""Run by `test_learns.py`: the same run on two processes.

python learning_ranks.py FOLDER CHECKPOINT STRATEGY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch.distributed as dist

from tests.support.learning import rewards
from tests.support.many_ranks import strategy_of


def main() -> None:
    folder, checkpoint, strategy = Path(sys.argv[1]), *sys.argv[2:]
    curve = rewards(folder, checkpoint, 0, 1e-3, **strategy_of(strategy, 2))
    if dist.get_rank() == 0:
        (folder / "curve.json").write_text(json.dumps(curve))


if __name__ == "__main__":
    main()
