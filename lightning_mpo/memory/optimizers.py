"""An optimizer with a small state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info


def _adamw() -> Any:
    """Return the AdamW of this machine."""
    if not torch.cuda.is_available():
        return torch.optim.AdamW
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit


class PagedAdamW(_adamw()):  # type: ignore[misc]
    """AdamW with 8-bit moments (arXiv:2110.02861) in memory that pages out to the CPU, on CUDA.

    On CUDA it is bitsandbytes' optimizer. Elsewhere it is torch's AdamW with 32-bit moments, and a
    line tells the user. The 8-bit kernels of the CPU would compile themselves at the first step,
    which takes more memory than they save. Weights of fewer than 4,096 elements keep 32-bit
    moments.

    Args:
        params: weights, or groups of them.
        lr: learning rate.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not torch.cuda.is_available():
            rank_zero_info(
                "optimizer  no CUDA here: AdamW with 32-bit moments in place of paged 8-bit ones"
            )
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
