"""Checksums of weights: of a quantised base, which no run may change, and of a whole model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mpo.errors import UserError


def quantised_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of quantised layers: weights and their scales."""
    for name, module in network.named_modules():
        # only weights of the module itself: wrappers of peft pass on those of another
        weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.is_floating_point():
            continue
        yield f"{name}.weight", weight.detach()
        # scales, and under double quantisation their own scales
        state: Any = getattr(weight, "quant_state", None)
        while state is not None:
            for key in ("absmax", "code", "offset"):
                part = getattr(state, key, None)
                if isinstance(part, Tensor):
                    yield f"{name}.{key}", part.detach()
            state, name = getattr(state, "state2", None), f"{name}.state2"


def checksums(network: nn.Module) -> dict[str, int]:
    """Return a checksum of each tensor of the quantised layers, computed on its device.

    A sum of bytes, each times an odd number that depends on its place, modulo 2⁶⁴: one changed byte
    always changes it.
    """
    return {name: _checksum(tensor) for name, tensor in quantised_tensors(network)}


def _checksum(tensor: Tensor) -> int:
    total = 0
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for index, part in enumerate(flat.split(2**20)):
        odd = torch.arange(len(part), device=part.device) * 2 + 1
        total += int((part * odd).sum()) * (2 * index + 1)
    return total % 2**64


def check_moved(network: nn.Module, before: dict[str, int]) -> None:
    """Compare the quantised layers with checksums taken before.

    Raises:
        UserError: a byte moved; names the tensors.
    """
    after = checksums(network)
    moved = [name for name in before if after.get(name) != before[name]]
    if moved:
        raise UserError(
            f"{len(moved)} of {len(before)} tensors of the quantised base moved, the first is "
            f"`{moved[0]}`: policy and reference are no longer what was loaded, so the run stops. "
            "Something wrote into the base: a merge of adapters, or a kernel that repacks weights "
            "in place"
        )


def fingerprint(module: nn.Module) -> str:
    """Return a digest of all weights, which sums of their bits make independent of the device."""
    digest = hashlib.sha256()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, weight in sorted(module.state_dict().items()):
        bits = weight.detach().contiguous().view(integers[weight.element_size()]).flatten()
        sums = [int(bits.sum(dtype=torch.int64)), int(bits[::7].sum(dtype=torch.int64))]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {sums}\n".encode())
    return digest.hexdigest()[:16]
