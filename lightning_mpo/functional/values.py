"""The loss of a critic."""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


def value_errors(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, *, clip: float | None = None) -> Tensor:
    """Measure how far values are from returns, with PPO's clip on how far they may move.

        ½ max((V - R)², (V_old + clip(V - V_old, -c, c) - R)²)          (PPO2's code, core-algorithms 0 [S])

    Args:
        values_BT: Of the current critic, shape ``[B, T]``, in units of reward; carries gradient.
        old_values_BT: Of the critic at rollout weights, shape ``[B, T]``.
        returns_BT: What the critic should say, shape ``[B, T]``.
        clip: c, above 0, in units of reward. None: no clip, the plain halved square.

    Returns:
        Errors, shape ``[B, T]``, unreduced.

    Raises:
        ValueError: If shapes differ or the clip is not above 0.

    >>> value_errors(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]]), clip=0.5)
    tensor([[1.1250]])
    """
    check(values_BT=values_BT, old_values_BT=old_values_BT, returns_BT=returns_BT)
    free = (values_BT - returns_BT).square()
    if clip is None:
        return 0.5 * free
    if not clip > 0:
        raise ValueError(f"`clip` must be above 0, got {clip}")
    moved = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    return 0.5 * torch.maximum(free, (moved - returns_BT).square())
