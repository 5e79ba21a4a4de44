"""Masked sums with an explicit denominator: the only place where per-action values become one
number.

A mean over a micro-batch is no mean over the batch: averaging means of unequal counts bends the
gradient. The denominator is therefore an argument, computed once per mini-batch over all
micro-batches and ranks (DAPO's token-level loss, Dr. GRPO's constant; docs/algorithms.md 7.2 and
16.4, invariant 9).
"""

from torch import Tensor

from lightning_mpo.functional.shapes import same


def weighted_sum(values: Tensor, weights: Tensor, denominator: float | Tensor) -> Tensor:
    """Sum values with weights and divide by a denominator that the caller counted over the whole
    mini-batch.

        Σ wᵢ xᵢ / denominator

    A value with weight 0 is never read, so that it may be anything, NaN and infinity included; no
    gradient goes there.

    Args:
        values: Shape ``[...]``.
        weights: Shape of ``values``, 0 where a value does not count.
        denominator: A number above 0, or a scalar tensor.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes differ or a numeric denominator is not above 0.

    >>> import torch
    >>> values, weights = torch.tensor([[1.0, 2.0, float("nan")]]), torch.tensor([[1.0, 3.0, 0.0]])
    >>> weighted_sum(values, weights, 4.0)
    tensor(1.7500)
    """
    same(values=values, weights=weights)
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"`denominator` must be above 0, got {denominator}")
    counted = weights != 0
    return (values.masked_fill(~counted, 0) * weights).sum() / denominator
