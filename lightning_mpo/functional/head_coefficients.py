"""How much a policy loss of multi-token heads may weigh beside that of the policy (RL-MTP)."""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


def calibrated_coefficients(
    head_BTM: Tensor, policy_BTM: Tensor, alive_BTM: Tensor, *, eps: float = 1e-8
) -> Tensor:
    """Divide the correlation of heads and policy by the size of the heads' own deviation.

        λ_{b,n} = Σ_t δ δ^n / (Σ_t (δ^n)² + eps)
                                (OCC, arXiv:2605.28184 [S, C]; by response [I]; docs/algorithms.md 11.3)

    δ is the log-ratio of a token under the policy, δ^n that of the same token under head n. Log-
    ratios stand for gradients: the loss of the heads helps the policy to the first order by their
    product, and disturbs it to the second by their square. On the policy that sampled δ = 0, so
    that the heads have no weight.

    Args:
        head_BTM: log q_n(o_{t+n} | h_t) - log π_old(o_{t+n}), shape ``[B, T, M]``, nats.
        policy_BTM: log π(o_{t+n}) - log π_old(o_{t+n}), same shape.
        alive_BTM: Where the token t+n counts (bool), same shape. Others are never read.
        eps: Keeps the quotient finite, above 0.

    Returns:
        Coefficients without gradient, shape ``[B, M]``; negative where heads and policy move apart.

    Raises:
        ValueError: If shapes differ or ``eps`` is not positive.

    >>> head, policy = torch.tensor([[[2.0], [1.0]]]), torch.tensor([[[1.0], [0.5]]])
    >>> calibrated_coefficients(head, policy, torch.ones(1, 2, 1).bool())
    tensor([[0.5000]])
    """
    check(head_BTM=head_BTM, policy_BTM=policy_BTM, mask_BTM=alive_BTM)
    if not eps > 0:
        raise ValueError(f"`eps` must be above 0, got {eps}")
    head = torch.where(alive_BTM, head_BTM.detach(), 0.0)
    policy = torch.where(alive_BTM, policy_BTM.detach(), 0.0)
    return (head * policy).sum(1) / (head.square().sum(1) + eps)
