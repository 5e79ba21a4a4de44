"""Every action space with its options, and random log-ratios for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.action_spaces import ActionSpace
from lightning_mpo.objective.block_weights import BlockWeights, FutureShare, GeometricDecay
from lightning_mpo.types import Rollout
from tests.support.builders import VOCABULARY, right_padded, seeded

WEIGHTS: list[BlockWeights] = [
    FutureShare(0.0),
    FutureShare(0.3),
    GeometricDecay(0.5),
    GeometricDecay(1.0),
]


def name(space: ActionSpace) -> str:
    return f"{type(space).__name__}{list(vars(space).values())}".replace(" ", "")


PLAIN = right_padded([7, 1, 0, 4, 8, 3], 9)
GAPS = torch.tensor(
    [
        [1, 1, 1, 0, 1, 1, 1, 1, 0],
        [0, 1, 0, 1, 1, 0, 0, 1, 1],
        [0] * 9,
        [1] * 9,
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
    ]
).bool()
each_mask = pytest.mark.parametrize("mask", [PLAIN, GAPS], ids=["plain", "gaps"])


def ratios(mask: Tensor, seed: int = 0, garbage: float = 0.0) -> Tensor:
    values = 0.3 * torch.randn(mask.shape, generator=seeded(seed), dtype=torch.float64)
    return torch.where(mask, values, garbage)


def segments(space: ActionSpace, mask: Tensor, rows: Tensor | None = None) -> Tensor | None:
    """Let the space number its actions over random tokens and entropies, the same for a row whatever its width."""
    B, T = mask.shape
    rows = torch.arange(B) if rows is None else rows
    ids = torch.randint(0, VOCABULARY, (16, 16), generator=seeded(8))[rows, :T]
    entropy = torch.rand(16, 16, generator=seeded(9))[rows, :T]
    rollout = Rollout(ids, mask, mask, torch.arange(B), torch.zeros(B, T), torch.zeros(B))
    texts = [f"{i}\n" if i % 4 == 0 else str(i) for i in range(VOCABULARY)]
    return space.segment(
        rollout, entropy if space.needs_entropy else None, texts if space.needs_texts else ()
    )


def group(
    space: ActionSpace, values: Tensor, mask: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    log_ratios, starts, weights = space.action_log_ratios(values, mask, segments(space, mask, rows))
    return torch.where(starts, log_ratios, 0), starts, weights
