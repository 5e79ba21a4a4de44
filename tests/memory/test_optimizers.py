"""Paged 8-bit AdamW, and what it is without a GPU."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.memory.optimizers import PagedAdamW, _adamw


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA it is another")
def test_without_cuda_it_is_adamw_and_says_so(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        optimizer = PagedAdamW([torch.nn.Parameter(torch.zeros(3))], lr=1e-2, betas=(0.8, 0.9))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert "no CUDA here: AdamW with 32-bit moments" in caplog.text
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-2, (0.8, 0.9), 0.0)


def test_with_cuda_it_is_bitsandbytes(monkeypatch):
    from bitsandbytes.optim import PagedAdamW8bit

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _adamw() is PagedAdamW8bit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_moments_are_bytes_on_the_device():
    weight = torch.nn.Parameter(torch.randn(64, 128, device="cuda"))
    optimizer = PagedAdamW([weight], lr=1e-2)
    weight.square().sum().backward()
    optimizer.step()
    moments = [
        v
        for v in optimizer.state[weight].values()
        if torch.is_tensor(v) and v.shape == weight.shape
    ]
    assert [value.dtype for value in moments] == [torch.uint8, torch.uint8]
