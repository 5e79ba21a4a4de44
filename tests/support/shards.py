"""A small checkpoint in shards."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_mpo.storage import Disk, write_folder

SHARD = "__0_0.distcp"
NAME = "policy.network.weight"


def write(path: Path, value: float = 1.0, disk: Disk | None = None) -> Path:
    weight = torch.full((16, 16), value)
    optimizer = {
        "state": {NAME: {"step": torch.tensor(3.0)}},
        "param_groups": [{"lr": 0.1, "params": [NAME]}],
    }
    shards = {"state_dict": {NAME: weight}, "optimizer_0": optimizer}
    write_folder(shards, {"global_step": int(value), "mtp": None}, path, disk or Disk())
    return path
