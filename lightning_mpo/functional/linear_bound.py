"""A bound of the surrogate that is a sum over noised samples (BGPO, arXiv:2510.11683).

Each sample has a backward pass of its own, so memory does not grow with their number.
"""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


def linear_bound(log_ratios_BU: Tensor, advantages_BU: Tensor, *, limit: float = 20.0) -> Tensor:
    """Bound the surrogate from below, sample by sample; the loss is minus the bound.

        loss = -(1 + d) A       where A ≥ 0     (e^x ≥ 1 + x)
        loss = -exp(d) A        where A < 0     (exp(mean d) ≤ mean exp(d))
                                                           (BGPO eq. 12 to 19 [P]; docs/algorithms.md 5.8)

    The mean of the bounds over samples j is at most A exp(mean_j d_j). At d = 0 bound and surrogate
    have equal values and gradients. For one sample and A < 0 they are equal everywhere, up to
    `limit`.

    Args:
        log_ratios_BU: d, the difference of two ELBO samples under one mask, shape ``[B, U]``, nats.
            Carries the gradient.
        advantages_BU: Advantages of the responses, shape ``[B, U]``.
        limit: Largest d in the exponential, above 0, nats. A larger d counts as `limit` and has no
            gradient [I].

    Returns:
        Losses, shape ``[B, U]``.

    Raises:
        ValueError: If the shapes differ, or `limit` is not above 0.

    >>> linear_bound(torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, -1.0]]))
    tensor([[-1.5000,  1.0000]])
    """
    check(log_ratios_BU=log_ratios_BU, advantages_BU=advantages_BU)
    if not limit > 0:
        raise ValueError(f"`limit` must be above 0, got {limit}")
    exponential_BU = log_ratios_BU.clamp(max=limit).exp()
    return -torch.where(advantages_BU >= 0, 1 + log_ratios_BU, exponential_BU) * advantages_BU
