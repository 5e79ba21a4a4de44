"""A checkpoint that runs code when it is unpickled."""

from __future__ import annotations

import os
from pathlib import Path

import torch

MARK = "executed"


class Malicious:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


def write_malicious(path: Path) -> Path:
    torch.save({"state_dict": {"policy.network.x": torch.zeros(1)}, "callbacks": Malicious()}, path)
    return path
