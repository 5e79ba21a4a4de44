"""A low-rank adapter on the unembedding, apart from it, so that no second ``[V, D]`` is made."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from lightning_mpo.functional.shapes import check
from lightning_mpo.functional.sharded_rows import full_weight


@dataclass(frozen=True)
class LowRank:
    """The term that LoRA adds to raw logits (arXiv:2106.09685):

        h (W + s · B A)ᵀ = h Wᵀ + u Bᵀ,    u = s · dropout(h) Aᵀ

    Products are in the dtype of the adapter, as in peft: float32 adapters over a bfloat16 base stay
    float32, also under autocast.

    Args:
        down_RD: A, shape ``[R, D]``.
        up_VR: B, shape ``[V, R]``.
        factor: s, alpha / rank.
        dropout: Probability of the dropout on h; 0: none.

    Raises:
        ValueError: If shapes differ or the probability is not in [0, 1).
    """

    down_RD: Tensor
    up_VR: Tensor
    factor: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check(down_RD=self.down_RD, up_VR=self.up_VR)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}")

    def inner(self, hidden_ND: Tensor) -> Tensor:
        """Return u, shape ``[N, R]``; with dropout, a new draw each time."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden_ND = dropout(hidden_ND.to(self.down_RD.dtype), self.dropout)
            return linear(hidden_ND, full_weight(self.down_RD)).to(self.up_VR.dtype) * self.factor
