"""Several rewards of a response, each compared within the group by itself (GDPO, arXiv:2601.05242).

Advantages are data: nothing here carries a gradient (docs/algorithms.md 4.9).
"""

import torch
from torch import Tensor

from lightning_mpo.functional.advantages import group_relative
from lightning_mpo.functional.shapes import check


@torch.no_grad()
def decoupled_relative(
    rewards_BR: Tensor, weights_R: Tensor, group_size: int, *, valid_B: Tensor | None = None
) -> Tensor:
    """Normalise each reward within its group, and sum the results with weights.

        A_i = Σ_k w_k (r_ik - mean_k) / (std_k + 1e-4)     ([C, TRL and verl]; docs/algorithms.md 4.9)

    Mean and Bessel-corrected deviation of reward k are over the completions of the group that it
    judged. It adds 0 to the others, and 0 to groups of equal rewards.

    Args:
        rewards_BR: Rewards, unweighted; nan: not judged. Groups consecutive, shape ``[B, R]``.
        weights_R: Weights of the rewards, shape ``[R]``.
        group_size: Completions per prompt, at least 2.
        valid_B: False for rows whose rewards mean nothing, shape ``[B]``.

    Returns:
        Advantages, shape ``[B]``.

    Raises:
        ValueError: If shapes differ, the rewards are no whole groups, or a group has one row.

    >>> rewards = torch.tensor([[1.0, 9.0], [0.0, 0.0], [0.0, torch.nan]])
    >>> decoupled_relative(rewards, torch.tensor([1.0, 0.5]), 3)
    tensor([ 1.5080, -0.9308, -0.5773])
    """
    check(rewards_BR=rewards_BR, weights_R=weights_R, valid_B=valid_B)
    judged_BR = ~rewards_BR.isnan()
    if valid_B is not None:
        judged_BR = judged_BR & valid_B[:, None]
    advantages = [
        weight * group_relative(rewards_B, group_size, valid_B=judged_B)
        for weight, rewards_B, judged_B in zip(
            weights_R, rewards_BR.nan_to_num().unbind(1), judged_BR.unbind(1), strict=True
        )
    ]
    return torch.stack(advantages).sum(0)
