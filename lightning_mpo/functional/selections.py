"""Which tokens of a response carry gradient: a sample, or those of highest entropy.

S-GRPO (arXiv:2504.20834) learns from 30 to 50 % of the tokens [S]; what is not chosen needs no head
and no loss (docs/algorithms.md 6).
"""

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


def first_tokens(mask_BT: Tensor, count: int) -> Tensor:
    """Tell which are the first tokens of their row.

    Args:
        mask_BT: Response tokens, shape ``[B, T]``.
        count: How many, at least 0.

    Returns:
        Bool, shape ``[B, T]``.

    >>> first_tokens(torch.tensor([[True, False, True, True]]), 2)
    tensor([[ True, False,  True, False]])
    """
    check(mask_BT=mask_BT)
    return mask_BT & (mask_BT.cumsum(1) <= count)


def sampled_tokens(
    mask_BT: Tensor,
    uniform_BT: Tensor,
    *,
    prefix: int,
    cap: int | None,
    probability: float,
    uniform_cap: bool = False,
) -> Tensor:
    """Choose the first tokens of a row, and later ones by chance up to a cap.

        t in T_i  <=>  t < prefix,   or   u_t < probability and fewer than cap tokens of row i are
                                          chosen before t
                                                              (S-GRPO [S]; docs/algorithms.md 6.1)

    t counts response tokens. With `uniform_cap` the later ones that were drawn are thinned evenly
    to the cap instead of from the left [C, a re-implementation]; the order of thinning is that of
    the same uniform numbers.

    Args:
        mask_BT: Response tokens, shape ``[B, T]``.
        uniform_BT: Uniform numbers in [0, 1), shape ``[B, T]``.
        prefix: Tokens that are always chosen, at least 0.
        cap: Most tokens of a row, not below the prefix; None: no cap.
        probability: Of choosing a later token, in (0, 1].
        uniform_cap: Whether the cap thins evenly.

    Returns:
        Bool, False outside the mask, shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ or an option is out of range.

    >>> uniform = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.3]])
    >>> mask = torch.ones(1, 5, dtype=torch.bool)
    >>> sampled_tokens(mask, uniform, prefix=1, cap=3, probability=0.5)
    tensor([[ True,  True, False,  True, False]])
    """
    check(mask_BT=mask_BT, uniform_BT=uniform_BT)
    if prefix < 0 or not 0 < probability <= 1:
        raise ValueError(
            f"`prefix` must be >= 0 and `probability` in (0, 1], got {prefix} and {probability}"
        )
    if cap is not None and cap < prefix:
        raise ValueError(f"`cap` must not be below `prefix` ({prefix}), got {cap}")
    always_BT = first_tokens(mask_BT, prefix)
    drawn_BT = mask_BT & ~always_BT & (uniform_BT < probability)
    if cap is None:
        return always_BT | drawn_BT
    evenly_BT = (
        uniform_BT.masked_fill(~drawn_BT, 2.0).argsort(1).argsort(1) + 1
    )  # given u < P, u is uniform
    order_BT = evenly_BT if uniform_cap else drawn_BT.cumsum(1)
    return always_BT | (drawn_BT & (order_BT <= cap - prefix))


def highest(values_BT: Tensor, mask_BT: Tensor, *, share: float) -> Tensor:
    """Choose the largest values of each row: `ceil(share · n)` of its n tokens, the earlier of
    equal ones.

    Args:
        values_BT: Any values, shape ``[B, T]``. Not read outside the mask.
        mask_BT: Tokens to choose from, shape ``[B, T]``.
        share: Of a row's tokens, in (0, 1].

    Returns:
        Bool, False outside the mask, shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ or the share is out of range.

    >>> mask = torch.tensor([[True, True, False, True]])
    >>> highest(torch.tensor([[0.1, 0.9, 0.2, 0.3]]), mask, share=0.5)
    tensor([[False,  True, False,  True]])
    """
    check(values_BT=values_BT, mask_BT=mask_BT)
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be in (0, 1], got {share}")
    rank_BT = (
        values_BT.masked_fill(~mask_BT, -torch.inf)
        .argsort(dim=1, descending=True, stable=True)
        .argsort(1)
    )
    counts_B = (
        share * mask_BT.sum(1).double() - 1e-9
    ).ceil()  # 0.07 · 100 is a little over 7 and means seven
    return mask_BT & (rank_BT < counts_B[:, None])
