"""The coefficients of the policy loss of multi-token heads (RL-MTP)."""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


def calibrated_coefficients(
    head_BTM: Tensor, policy_BTM: Tensor, mask_BTM: Tensor, *, eps: float = 1e-8
) -> Tensor:
    """Return the coefficient of each head: its correlation with the policy, by its sum of squares.

        λ_{b,n} = Σ_t δ δ^n / (Σ_t (δ^n)² + eps)
                                (OCC, arXiv:2605.28184 [S, C]; by response [I]; docs/algorithms.md 11.3)

    δ is the log-ratio of a token under the policy, δ^n that of the same token under head n. They
    stand for gradients. To first order, the loss of the heads helps the policy by their product. To
    second order, it disturbs the policy by the square of δ^n. In the first update on a rollout δ is
    0, so that all coefficients are 0.

    Args:
        head_BTM: log q_n(o_{t+n} | h_t) - log π_old(o_{t+n}), shape ``[B, T, M]``, nats.
        policy_BTM: log π(o_{t+n}) - log π_old(o_{t+n}), same shape.
        mask_BTM: Where the token t+n counts, bool, same shape. Other values are never read.
        eps: Added to the denominator, above 0.

    Returns:
        Coefficients without gradient, shape ``[B, M]``; negative where heads and policy move apart.

    Raises:
        ValueError: If shapes differ or ``eps`` is not positive.

    >>> head, policy = torch.tensor([[[2.0], [1.0]]]), torch.tensor([[[1.0], [0.5]]])
    >>> calibrated_coefficients(head, policy, torch.ones(1, 2, 1).bool())
    tensor([[0.5000]])
    """
    check(head_BTM=head_BTM, policy_BTM=policy_BTM, mask_BTM=mask_BTM)
    if not eps > 0:
        raise ValueError(f"`eps` must be above 0, got {eps}")
    head = torch.where(mask_BTM, head_BTM.detach(), 0.0)
    policy = torch.where(mask_BTM, policy_BTM.detach(), 0.0)
    return (head * policy).sum(1) / (head.square().sum(1) + eps)
