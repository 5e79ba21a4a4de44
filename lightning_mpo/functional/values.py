"""The loss of a critic, and how much of the returns it explains (docs/algorithms.md 10)."""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


def value_errors(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, *, clip: float | None = None
) -> Tensor:
    """Measure how far values are from returns, with PPO's clip on how far they may move.

        ½ max((V - R)², (V_old + clip(V - V_old, -c, c) - R)²)
                                              (PPO2's form [C, TRL and verl]; docs/algorithms.md 10)

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


def explained_variance(error: float, value: float, target: float, square: float) -> float:
    """Measure which share of the returns' variance a critic foresees.

        1 - Var(R - V) / Var(R),   Var(R - V) = E[(R - V)²] - (E R - E V)²,   Var(R) = E R² - (E R)²

    Args:
        error: E[(R - V)²], over tokens.
        value: E V.
        target: E R.
        square: E R².

    Returns:
        1: all of it, 0: as much as a constant, below 0: less. 0 too where returns do not vary.

    >>> explained_variance(error=0.25, value=0.5, target=0.5, square=0.75)
    0.5
    """
    variance = square - target**2
    return 1 - (error - (target - value) ** 2) / variance if variance > 1e-12 else 0.0
