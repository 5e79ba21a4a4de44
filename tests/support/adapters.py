"""Policies with adapters that moved, their gradients and their checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mpo.policies import CausalPolicy, Lora
from tests.support.builders import seeded

PROMPTS, RESPONSES = [6, 9, 4], [5, 1, 3, 2, 1, 7, 4, 4, 1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def always_share(monkeypatch):
    """A model of 32 dimensions would hardly ever share: its attention costs more than its projections."""
    monkeypatch.setattr(
        "lightning_mpo.policies.packing._cost",
        lambda widths, lines, hidden_size: len(lines),
    )


def gradients(policy: CausalPolicy, loss: Tensor) -> list[Tensor]:
    weights = [p for p in policy.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, weights))


def lora_policy(folder: str, **options) -> CausalPolicy:
    policy = CausalPolicy(folder, lora=Lora(rank=4, alpha=8), **options)
    torch.manual_seed(5)
    policy.build(device=CPU, reference=True)
    return policy


def move_adapters(policy: CausalPolicy) -> None:
    g = seeded(6)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=g))


def score(policy: CausalPolicy, rollout, **options) -> Tensor:
    with torch.no_grad():
        return policy.score(
            rollout, rollout.response_mask_BT, temperature=1.0, **options
        ).logprobs_BT


def save(policy: CausalPolicy, path) -> None:
    state = {
        f"policy.{key}": value for key, value in policy.trained_state(policy.state_dict()).items()
    }
    torch.save({"state_dict": state | {"metric": torch.zeros(1)}}, path)
