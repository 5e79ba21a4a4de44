"""Paged 8-bit AdamW, and what it is without a GPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from lightning_mpo.optimizers import PagedAdamW


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to page to")
def test_without_cuda_it_is_adamw_with_moments_in_bytes(caplog):
    weight = torch.nn.Parameter(torch.randn(64, 128))
    other = copy.deepcopy(weight)
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.simplefilter("error")
        small = PagedAdamW([weight], lr=1e-2)
    assert "no CUDA here" in caplog.text
    plain = torch.optim.AdamW([other], lr=1e-2, weight_decay=0.0)
    target = torch.randn(64, 128)
    for _ in range(5):
        for optimizer, w in ((small, weight), (plain, other)):
            optimizer.zero_grad()
            (w - target).square().mean().backward()
            optimizer.step()
    assert (weight - other).norm() < 0.05 * (other - target).norm()
    moments = [
        value for value in small.state[weight].values() if torch.is_tensor(value) and value.shape == weight.shape
    ]
    assert len(moments) == 2
    assert all(value.dtype == torch.uint8 for value in moments)
