"""Warns of number formats in which a CPU computes slowly."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn


def computes_natively(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if a device has instructions for products in a format; all GPUs count."""
    kernels: Any = torch.ops.mkldnn
    if device.type != "cpu" or dtype == torch.float32:
        return True
    if dtype == torch.float16:
        return bool(kernels._is_mkldnn_fp16_supported())
    return bool(kernels._is_mkldnn_bf16_supported())


def warn_where_slow(dtype: torch.dtype, compute_dtype: str | None, device: torch.device) -> None:
    """Warn of a format for whose products a CPU has no instructions.

    On one x86 CPU with AVX2 alone a bfloat16 product of 1024 x 576 x 1536 took 45 times as long as
    a float32 one [measured].

    Args:
        dtype: of `policy.dtype`.
        compute_dtype: of `policy.quantization`, if there is one.
        device: of the policy.
    """
    formats = {"policy.dtype": dtype}
    if compute_dtype is not None:
        formats["policy.quantization.compute_dtype"] = getattr(torch, compute_dtype)
    slow = [option for option, kind in formats.items() if not computes_natively(kind, device)]
    if slow:
        rank_zero_warn(
            f"this CPU has no instructions for {formats[slow[0]]}, in which products are tens of "
            "times slower than in float32; "
            + "set "
            + " and ".join(f"`{option}: float32`" for option in slow)
        )
