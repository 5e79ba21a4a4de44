"""Every kind of critic, and a loop over rows that computes its values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_mpo.policies import CausalPolicy, SeparateCritic, ValueHead
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import seeded

PROMPTS, RESPONSES = [6, 9, 4], [5, 1, 3, 2, 1, 7, 4, 4, 1]
REQUEST = ScoreRequest(values=True)
CRITICS = {
    "linear": lambda: ValueHead(),
    "hidden": lambda: ValueHead(width=8),
    "detached": lambda: ValueHead(detach_trunk=True),
    "separate": lambda: SeparateCritic(),
    "separate-hidden": lambda: SeparateCritic(width=8),
}
each_critic = pytest.mark.parametrize("kind", CRITICS)


@pytest.fixture(autouse=True)
def always_share(monkeypatch):
    """A model of 32 dimensions would hardly ever share: its attention costs more than its projections."""
    monkeypatch.setattr(
        "lightning_mpo.policies.packing._cost",
        lambda widths, lines, hidden_size: len(lines),
    )


def scramble_critic(module: nn.Module, size: float = 0.4) -> None:
    generator = seeded(7)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(
                size
                * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(
                    weight.dtype
                )
            )


def trunk_of(policy: CausalPolicy) -> nn.Module:
    return policy.critic.trunk if isinstance(policy.critic, SeparateCritic) else policy.decoder()


def naive(policy: CausalPolicy, rollout) -> list[Tensor]:
    """Value one row at a time: the states that have read all tokens before the one that is valued."""
    S, rows = rollout.prompt_length, []
    for b in range(len(rollout.group_B)):
        prompt = rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]]
        response = rollout.responses_BT[b][rollout.response_mask_BT[b]]
        values = []
        for t in range(len(response)):
            read = torch.cat([prompt, response[:t]])[None]
            hidden = trunk_of(policy)(input_ids=read, use_cache=False).last_hidden_state[0, -1]
            for layer in policy.critic.head:
                hidden = (
                    layer.weight @ hidden + layer.bias
                    if isinstance(layer, nn.Linear)
                    else nn.functional.silu(hidden)
                )
            values.append(hidden[0])
        rows.append(torch.stack(values))
    return rows


def values_of(policy: CausalPolicy, rollout, mask: Tensor | None = None) -> Tensor:
    mask = rollout.response_mask_BT if mask is None else mask
    return policy.score(rollout, mask, temperature=0.7, request=REQUEST).values_BT
