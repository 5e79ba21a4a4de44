"""Rewards that depend on the length of a response."""

from torch import Tensor

from lightning_mpo.functional.shapes import same


def overlong_penalty(lengths: Tensor, limit: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Take more off the longer a response is, over the last tokens before a limit.

        -factor · clip((n - (limit - buffer)) / buffer, 0, 1)
                                           (DAPO's soft overlong punishment; docs/algorithms.md 4.7)

    0 up to `limit - buffer` tokens, then a straight line to `-factor` at the limit, and flat
    beyond, as in the paper [REC] and in TRL [C]. verl's goes on falling beyond the limit [C], where
    no response gets to.

    Args:
        lengths: Tokens of each response, a floating-point tensor of any shape.
        limit: Tokens from which on the whole penalty is due, at least 1.
        buffer: Tokens before the limit over which it grows, 1 to `limit`.
        factor: The whole penalty, above 0, in units of reward.

    Returns:
        Penalties, at most 0, of the shape of ``lengths``.

    Raises:
        ValueError: If an option is out of range.

    >>> import torch
    >>> overlong_penalty(torch.tensor([16384.0, 18432.0, 20480.0]), 20480, 4096)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    same(lengths=lengths)
    if not 1 <= buffer <= limit:
        raise ValueError(f"`buffer` must be between 1 and `limit` = {limit}, got {buffer}")
    if not factor > 0:
        raise ValueError(f"`factor` must be above 0, got {factor}")
    over = ((lengths - (limit - buffer)) / buffer).clamp(0, 1)
    return 0 - factor * over  # no negative zero
