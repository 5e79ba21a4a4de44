"""Masks of responses, and random log-ratios within them."""

import torch

MASKS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 0, 0],  # a plain response, padded on the right
        [1, 1, 1, 0, 0, 1, 1, 1, 1, 1],  # a tool call in between
        [0, 1, 0, 1, 1, 0, 1, 1, 1, 0],  # many gaps
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # nothing
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
).bool()
B, T = MASKS.shape


def ratios(*shape, seed=0):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 10
    )
