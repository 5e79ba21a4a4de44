"""Optimizers that keep their state small."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info


class PagedAdamW(torch.optim.AdamW):
    """AdamW with moments in 8 bits (arXiv:2110.02861), in memory that pages out to the CPU under pressure, on CUDA.

    Constructing it returns bitsandbytes' optimizer there. Elsewhere it returns torch's AdamW with moments in 32 bits and
    says so in one line: nothing is paged, and the 8-bit kernels of the CPU compile themselves at the first step, which takes
    more memory than they save. Weights of fewer than 4,096 elements keep moments of 32 bits.

    Args:
        params: weights, or groups of them.
        lr: learning rate.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the optimizer of this machine, which is of another class."""
        if torch.cuda.is_available():
            from bitsandbytes.optim import PagedAdamW8bit

            kind: Any = PagedAdamW8bit
        else:
            rank_zero_info("optimizer  no CUDA here: AdamW with 32-bit moments in place of paged 8-bit ones")
            kind = torch.optim.AdamW
        return kind(*args, **({"weight_decay": 0.0} | kwargs))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
