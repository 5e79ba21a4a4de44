"""Segments of a response: numbers that tokens of one action share.

A segment is a run of neighbouring response tokens; it ends where the mask has a gap, as windows do
[I] (docs/algorithms.md 3.4 and 3.5). All of it is computed once per rollout and carries no
gradient.
"""

import math

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


def number_segments(
    segments_BT: Tensor, mask_BT: Tensor, *, max_length: int | None = None
) -> Tensor:
    """Number the segments of each row 0, 1, 2, … in the order in which they stand.

    A new number begins at the first token of a row, where the id differs from that of the token
    before, and behind a gap of the mask; with ``max_length``, also after that many tokens of one
    segment, so that the last piece is the short one [I].

    Args:
        segments_BT: Ids of any size, shape ``[B, T]``. Never read outside the mask.
        mask_BT: Response tokens, shape ``[B, T]``.
        max_length: Tokens that a segment may have; None: any number.

    Returns:
        Numbers in [0, tokens of the row), 0 outside the mask, shape ``[B, T]``, int64.

    Raises:
        ValueError: If the shapes differ or ``max_length`` is below 1.

    >>> mask = torch.tensor([[True, True, True, True, False, True]])
    >>> number_segments(torch.tensor([[7, 7, 7, 2, 2, 2]]), mask, max_length=2)
    tensor([[0, 0, 1, 2, 0, 3]])
    """
    T = check(segments_BT=segments_BT, mask_BT=mask_BT)["T"]
    if max_length is not None and max_length < 1:
        raise ValueError(f"`max_length` must be at least 1, got {max_length}")
    goes_on_BT = torch.zeros_like(mask_BT)
    goes_on_BT[:, 1:] = mask_BT[:, :-1] & (segments_BT[:, 1:] == segments_BT[:, :-1])
    starts_BT = mask_BT & ~goes_on_BT
    if max_length is not None:
        here = torch.arange(T, device=mask_BT.device).expand(mask_BT.shape)
        first_BT = torch.where(starts_BT, here, 0).cummax(1).values
        starts_BT = mask_BT & ((here - first_BT) % max_length == 0)
    return (starts_BT.long().cumsum(1) - 1).masked_fill(~mask_BT, 0)


def find_return(segments_BT: Tensor, mask_BT: Tensor) -> tuple[int, int] | None:
    """Find a token whose id was there before, with another id in between.

    Only response tokens count: an id that goes on behind a gap of the mask has not been
    interrupted.

    Args:
        segments_BT: Ids of any size, shape ``[B, T]``. Never read outside the mask.
        mask_BT: Response tokens, shape ``[B, T]``.

    Returns:
        Row and position of the first such token, or None where every segment is one piece.

    Raises:
        ValueError: If the shapes differ.

    >>> find_return(torch.tensor([[1, 1, 2], [3, 4, 3]]), torch.ones(2, 3, dtype=torch.bool))
    (1, 2)
    """
    check(segments_BT=segments_BT, mask_BT=mask_BT)
    dense_BT = segments_BT.unique(return_inverse=True)[1].masked_fill(~mask_BT, -1)
    ids_BT, order_BT = dense_BT.sort(dim=1, stable=True)
    ranks_BT = mask_BT.long().cumsum(1).gather(1, order_BT)  # neighbours differ by 1
    same = (ids_BT[:, 1:] == ids_BT[:, :-1]) & (ids_BT[:, 1:] >= 0)
    returns = same & (ranks_BT[:, 1:] - ranks_BT[:, :-1] > 1)
    rows = returns.any(1).nonzero()
    if not len(rows):
        return None
    row = int(rows[0])
    return row, int(order_BT[row, 1:][returns[row]].min())


def above_quantile(values_BT: Tensor, mask_BT: Tensor, quantile: float) -> Tensor:
    """Tell which tokens lie above a quantile of their own row.

        x_t > x_(i),   i = floor(q · (n - 1)),   x_(0) <= … <= x_(n-1) the n values of the row

    The same tokens lie above the interpolated quantile. Equal values are all in or all out, so a
    row of equal values has none above.

    Args:
        values_BT: Any values, shape ``[B, T]``. Never read outside the mask.
        mask_BT: Tokens that count, shape ``[B, T]``.
        quantile: q, probability in [0, 1].

    Returns:
        Bool, False outside the mask, shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ or q is out of range.

    >>> mask = torch.tensor([[True, True, True, False]])
    >>> above_quantile(torch.tensor([[0.1, 0.9, 0.2, 0.3]]), mask, 0.5)
    tensor([[False,  True, False, False]])
    """
    T = check(values_BT=values_BT, mask_BT=mask_BT)["T"]
    if not 0 <= quantile <= 1:
        raise ValueError(f"`quantile` must be in [0, 1], got {quantile}")
    if not T:
        return mask_BT.clone()
    sorted_BT = values_BT.masked_fill(~mask_BT, math.inf).sort(1).values
    index_B = (quantile * (mask_BT.sum(1) - 1).clamp(min=0).double()).floor().long()
    return mask_BT & (values_BT > sorted_BT.gather(1, index_B[:, None]))
