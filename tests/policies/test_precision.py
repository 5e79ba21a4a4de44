"""A CPU that is slow at a number format is named before it is waited for."""

from __future__ import annotations

import types
import warnings

import pytest
import torch

from lightning_mpo.policies import precision

CPU = torch.device("cpu")


@pytest.fixture
def slow_cpu(monkeypatch):
    kernels = types.SimpleNamespace(
        _is_mkldnn_bf16_supported=lambda: False, _is_mkldnn_fp16_supported=lambda: False
    )
    monkeypatch.setattr(torch.ops, "mkldnn", kernels)


@pytest.mark.parametrize(
    ("dtype", "compute", "said"),
    [
        (torch.bfloat16, None, "set `policy.dtype: float32`$"),
        (
            torch.bfloat16,
            "bfloat16",
            "`policy.dtype: float32` and `policy.quantization.compute_dtype: float32`$",
        ),
        (
            torch.float32,
            "float16",
            "for torch.float16, .* set `policy.quantization.compute_dtype: float32`$",
        ),
    ],
)
def test_slow_formats_are_named(slow_cpu, dtype, compute, said):
    with pytest.warns(UserWarning, match=said):
        precision.warn_where_slow(dtype, compute, CPU)


def test_what_is_fast_is_not(slow_cpu, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.warn_where_slow(torch.float32, "float32", CPU)
        precision.warn_where_slow(torch.bfloat16, None, torch.device("cuda"))
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        precision.warn_where_slow(torch.bfloat16, "bfloat16", CPU)
