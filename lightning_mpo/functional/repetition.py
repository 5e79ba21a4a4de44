"""How much of a response repeats itself."""

import torch
from torch import Tensor

PRIME = 1_000_003


def repeated_share(tokens_BT: Tensor, mask_BT: Tensor, n: int = 4) -> Tensor:
    """Return the share of sequences of n tokens that stand earlier in the same response.

        1 - |set of n-grams| / |n-grams|

    N-grams are compared by a 64-bit hash. A response of fewer than n tokens has share 0.

    Args:
        tokens_BT: int64 ids of responses.
        mask_BT: bool; tokens that count. An n-gram with a token that does not count is left out.
        n: tokens of a sequence, at least 1.

    Returns:
        Shares from 0 to 1, float32 of shape ``[B]``.

    Raises:
        ValueError: If shapes differ, or ``n`` is below 1.

    >>> tokens_BT = torch.tensor([[1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6]])
    >>> repeated_share(tokens_BT, torch.ones(2, 6, dtype=torch.bool), n=2)
    tensor([0.6000, 0.0000])
    """
    if tokens_BT.shape != mask_BT.shape:
        raise ValueError(
            f"`mask_BT` must have the shape of `tokens_BT`, {tuple(tokens_BT.shape)}, got "
            f"{tuple(mask_BT.shape)}"
        )
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}")
    if tokens_BT.shape[1] < n:
        return torch.zeros(len(tokens_BT), device=tokens_BT.device)
    # one number for each n-gram; sums wrap around
    counts_BW = mask_BT.unfold(1, n, 1).all(-1)
    hash_BW = torch.zeros_like(counts_BW, dtype=torch.int64)
    for token_BW in tokens_BT.unfold(1, n, 1).unbind(-1):
        hash_BW = hash_BW * PRIME + token_BW + 1
    # equal numbers are neighbours once sorted, and those that do not count stand last
    last = torch.iinfo(torch.int64).max
    sorted_BW = hash_BW.masked_fill(~counts_BW, last).sort(1).values
    first_BW = torch.ones_like(counts_BW)
    first_BW[:, 1:] = sorted_BW[:, 1:] != sorted_BW[:, :-1]
    distinct_B = (first_BW & (sorted_BW != last)).sum(1)
    total_B = counts_BW.sum(1)
    return torch.where(total_B > 0, 1 - distinct_B / total_B.clamp(min=1), 0.0)
