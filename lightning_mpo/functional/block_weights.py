"""Weights of the token log-ratios within a block of MPO (docs/algorithms.md 3.3)."""

import torch
from torch import Tensor


def block_weights(n: int, future_share: float) -> Tensor:
    """Split the weight of a block between its first token and the future ones.

        β_0 = 1 - p,   β_i = p / (n - 1)  for i = 1 .. n-1
                                            (MPO-10 .. MPO-40 % [I, from S]; docs/algorithms.md 3.3)

    Args:
        n: Tokens in a block, the current one included; 1 gives the base algorithm.
        future_share: Share p of the future tokens, in [0, 1]; without effect if n is 1.

    Returns:
        Weights that sum to 1, shape ``[n]``, float64.

    Raises:
        ValueError: If an argument is out of range.

    >>> block_weights(3, 0.2).tolist()
    [0.8, 0.1, 0.1]
    """
    _check_length(n)
    if not 0 <= future_share <= 1:
        raise ValueError(f"`future_share` must be in [0, 1], got {future_share}")
    future = future_share / (n - 1) if n > 1 else 0.0
    return torch.tensor(
        [1 - future_share if n > 1 else 1.0] + [future] * (n - 1), dtype=torch.float64
    )


def geometric_weights(n: int, decay: float) -> Tensor:
    """Let the weight of a token fall by a constant factor per offset.

        β_i = decay^i / Σ_j decay^j   (closest to log-COP-TD [I]; docs/algorithms.md 3.3)

    Args:
        n: Tokens in a block, the current one included.
        decay: Factor per offset, above 0; 1 gives uniform weights.

    Returns:
        Weights that sum to 1, shape ``[n]``, float64.

    Raises:
        ValueError: If an argument is out of range.

    >>> geometric_weights(2, 0.25).tolist()
    [0.8, 0.2]
    """
    _check_length(n)
    if not decay > 0:
        raise ValueError(f"`decay` must be above 0, got {decay}")
    powers = decay ** torch.arange(n, dtype=torch.float64)
    return powers / powers.sum()


def _check_length(n: int) -> None:
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}")
