"""Curricula: weights of training rows, and draws of rows by their weights.

Letters: N training rows, P rows that are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor


def learnability(right_N: Tensor, judged_N: Tensor, floor: float = 0.1) -> Tensor:
    r"""Return a weight for each row that is highest for rows solved half of the time.

    $$w_n = \max\bigl(f,\; 4\,p_n (1 - p_n)\bigr), \qquad p_n = \frac{r_n + 1}{m_n + 2}$$

    p is the success rate after r right ones of m completions, under a uniform prior: a row without
    completions has p = 1/2 and w = 1.

    Args:
        right_N: r, number of right completions; shape `[N]`, may be fractions.
        judged_N: m, number of judged completions; shape `[N]`.
        floor: f, the smallest weight.

    Returns:
        w, without unit, float64, shape `[N]`, from f to 1.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> learnability(torch.tensor([0, 0, 5, 10]), torch.tensor([0, 10, 10, 10]), floor=0.35)
        tensor([1.0000, 0.3500, 1.0000, 0.3500], dtype=torch.float64)
    """
    if right_N.shape != judged_N.shape:
        raise ValueError(
            f"`right_N` and `judged_N` must have one shape, got {tuple(right_N.shape)} and "
            f"{tuple(judged_N.shape)}"
        )
    p_N = (right_N.double() + 1) / (judged_N.double() + 2)
    return (4 * p_N * (1 - p_N)).clamp(min=floor)


def add_counts(counts_N2: Tensor, index_P: Tensor, new_P2: Tensor, memory: float) -> Tensor:
    r"""Add counts of right and judged completions, and forget old ones.

    $$c_n \leftarrow (c_n + d_n) \cdot \min\bigl(1,\; M / (m_n + d^m_n)\bigr)$$

    d is the sum of the new counts of row n, and m the number of judged completions.

    Args:
        counts_N2: c, right and judged completions of each row; float64, shape `[N, 2]`.
        index_P: row of each new count, may repeat; shape `[P]`.
        new_P2: new counts; shape `[P, 2]`.
        memory: M, the largest number of judged completions that a row remembers.

    Returns:
        The new counts; float64, shape `[N, 2]`.

    Raises:
        ValueError: `index_P` and `new_P2` have different lengths.

    Example:
        >>> counts_N2 = torch.tensor([[4.0, 8.0], [0.0, 0.0]], dtype=torch.float64)
        >>> add_counts(counts_N2, torch.tensor([0]), torch.tensor([[8, 8]]), memory=8)
        tensor([[6., 8.],
                [0., 0.]], dtype=torch.float64)
    """
    if len(index_P) != len(new_P2):
        raise ValueError(
            f"`index_P` and `new_P2` must be equally long, got {len(index_P)} and {len(new_P2)}"
        )
    sums_N2 = counts_N2.double().index_add(0, index_P, new_P2.double())
    judged_N1 = sums_N2[:, 1:].clamp(min=1.0)
    return sums_N2 * (memory / judged_N1).clamp(max=1.0)


def draw_rows(weights_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw rows with probabilities in proportion to their weights.

    No row is drawn twice before all rows with a positive weight were drawn.

    Args:
        weights_N: weights of at least 0; float64, shape `[N]`.
        count: P, number of rows to draw.
        generator: the source of randomness.

    Returns:
        Numbers of rows; int64, shape `[P]`.

    Raises:
        ValueError: no weight is positive.

    Example:
        >>> draws_P = draw_rows(torch.tensor([0.0, 1.0, 2.0]), 4, torch.Generator().manual_seed(0))
        >>> draws_P.bincount()
        tensor([0, 2, 2])
    """
    positive = int((weights_N > 0).sum())
    if not positive:
        raise ValueError("`weights_N` must hold a positive weight")
    passes = []
    for left in range(count, 0, -positive):
        size = min(left, positive)
        passes.append(torch.multinomial(weights_N, size, generator=generator))
    return torch.cat(passes)
