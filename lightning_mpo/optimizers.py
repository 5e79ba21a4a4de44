"""Optimizers that keep their state small. Importing this imports bitsandbytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.optim import PagedAdamW8bit
from lightning.pytorch.utilities import rank_zero_info


class PagedAdamW(PagedAdamW8bit):
    """AdamW with moments in 8 bits (arXiv:2110.02861), on CUDA in memory that pages out to the CPU under pressure.

    Without CUDA there is nothing to page, which is said in one line; the numbers are the same. Weights of fewer than 4,096
    elements keep moments of 32 bits.

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
            rank_zero_info("optimizer  no CUDA here: 8-bit AdamW without paging")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not supported on CPU.*")
            super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
