"""Scores of designed properties: how far a number is from the range that a design wants."""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import same


def range_score(values_B: Tensor, low: float, high: float, margin: float) -> Tensor:
    """Score numbers by their distance from a range.

        s(x) = max(0, 1 − max(low − x, x − high, 0) / margin)                              [I]

    Args:
        values_B: Numbers, shape ``[B]``.
        low: Least number with the full score; minus infinity: none.
        high: Largest number with the full score; infinity: none.
        margin: Distance from the range at which the score is 0, above 0.

    Returns:
        Scores in [0, 1], shape ``[B]``.

    Raises:
        ValueError: If the range is empty, or the margin not above 0.

    >>> range_score(torch.tensor([1.0, 2.0, 5.0, 11.0]), low=2, high=9, margin=4).tolist()
    [0.75, 1.0, 1.0, 0.5]
    """
    if not low <= high or not margin > 0:
        raise ValueError(
            f"`low` must be at most `high` and `margin` above 0, got {low}, {high} and {margin}"
        )
    distance_B = torch.maximum(low - values_B, values_B - high).clamp(min=0)
    return (1 - distance_B / margin).clamp(min=0)


def geometric_mean(scores_BF: Tensor) -> Tensor:
    """Return the geometric mean of the scores of each row.

        (Π_f s_f)^(1/F)          0 if one of them is 0, so no property can make up for another [I]

    Args:
        scores_BF: Scores, at least 0, shape ``[B, F]``.

    Returns:
        Means, shape ``[B]``.

    Raises:
        ValueError: If a score is negative, or there is none.

    >>> geometric_mean(torch.tensor([[1.0, 0.25], [1.0, 0.0]])).tolist()
    [0.5, 0.0]
    """
    if not scores_BF.shape[1] or bool((scores_BF < 0).any()):
        raise ValueError("`scores_BF` must hold at least one score of a row, none below 0")
    return scores_BF.prod(1).pow(1 / scores_BF.shape[1])


def composition(tokens_BT: Tensor, mask_BT: Tensor, letters: int) -> Tensor:
    """Return the share of each letter in each row.

        x_f = (1 / n) Σ_t [letter t is f]

    Args:
        tokens_BT: Numbers of the letters, 0 to ``letters`` − 1, shape ``[B, T]``.
        mask_BT: Letters that count, bool, shape ``[B, T]``.
        letters: F, size of the alphabet.

    Returns:
        Shares, float64, shape ``[B, F]``; 0 for a row without letters.

    >>> tokens, mask = torch.tensor([[0, 2, 2, 0]]), torch.tensor([[True, True, True, False]])
    >>> composition(tokens, mask, 3)
    tensor([[0.3333, 0.0000, 0.6667]], dtype=torch.float64)
    """
    same(tokens_BT=tokens_BT, mask_BT=mask_BT)
    counts_BF = torch.zeros(len(tokens_BT), letters, dtype=torch.float64)
    counts_BF.scatter_add_(1, tokens_BT.masked_fill(~mask_BT, 0), mask_BT.double())
    return counts_BF / counts_BF.sum(1, keepdim=True).clamp(min=1)
