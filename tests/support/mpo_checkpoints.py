"""A checkpoint of a tiny policy with multi-token heads."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_mpo.policies import MTPHeads, TinyPolicy
from tests.support.mpo_scripts import common, freeze


def write_checkpoint(path: Path, mtp: MTPHeads | None) -> str:
    """Write a tiny policy over the quickstart's alphabet, sharp and with heads that differ from the trunk."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = TinyPolicy(
            common.CHARACTERS,
            hidden_size=32,
            layers=2,
            heads=4,
            intermediate_size=48,
            mtp=mtp,
            max_length=64,
        )
        policy.build(device=torch.device("cpu"), reference=False)
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(4.0).add_(
                    0.05 * torch.randn(weight.shape)
                ) if weight.ndim == 2 else None
    path.parent.mkdir(parents=True, exist_ok=True)
    freeze.save_weights(policy, path)
    return str(path)
