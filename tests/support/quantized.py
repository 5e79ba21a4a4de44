"""Policies with adapters over a base in four bits."""

from __future__ import annotations

import torch

from lightning_mpo.policies import CausalPolicy, Lora, Quantization
from tests.support.builders import seeded

CPU = torch.device("cpu")
EXACT = Quantization(compute_dtype="float32")


def unbuilt(folder: str, **options) -> CausalPolicy:
    return CausalPolicy(
        folder, **({"lora": Lora(rank=4, alpha=8), "quantization": EXACT} | options)
    )


def built(folder: str, *, perturb: bool = True, **options) -> CausalPolicy:
    policy = unbuilt(folder, **options)
    policy.check()
    policy.build(device=CPU, reference=True)
    if perturb:  # adapters start at zero
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05, generator=seeded(1))
    return policy
