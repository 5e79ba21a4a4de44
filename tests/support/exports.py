"""Prompts and options of exports, a policy with adapters that moved, and its weights."""

from __future__ import annotations

import torch

from lightning_mpo.export import Sampling
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies import CausalPolicy, Lora
from tests.support.builders import make_prompts

PROMPTS = make_prompts([5, 3, 4])
TEMPERATURE = 0.7
SAMPLING = Sampling(TEMPERATURE, 30, FullVocabulary())
LORA = Lora(rank=4, alpha=8)


def adapted(folder: str, *, scale: float = 0.1, lora: Lora = LORA, **options) -> CausalPolicy:
    """Return a policy whose adapters moved it away from its base."""
    policy = CausalPolicy(folder, lora=lora, **options)
    policy.build(device=torch.device("cpu"), reference=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=scale)
    return policy
