"""The memory of a policy's weights, beside that of other ways to hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_mpo.policies.checksums import quantised_tensors
from lightning_mpo.policies.reference import frozen_tensors

if TYPE_CHECKING:
    from lightning_mpo.policies.base import Policy


@dataclass(frozen=True)
class Footprint:
    """Bytes of weights, by part.

    Args:
        numbers: how many weights the base has.
        base: bytes of the base without adapters; 16-bit embeddings and the scales of quantised
            layers included.
        adapters: bytes of LoRA's weights.
        parts: bytes of multi-token heads and critic.
        reference: bytes of a frozen copy, or of frozen adapters; 0 if the reference is the base
            with adapters off.
    """

    numbers: int
    base: int
    adapters: int
    parts: int
    reference: int

    @property
    def policy_and_reference(self) -> int:
        """Base, adapters and the reference."""
        return self.base + self.adapters + self.reference

    @property
    def bf16_pair(self) -> int:
        """A bfloat16 policy and a bfloat16 copy of it as the reference."""
        return 2 * 2 * self.numbers

    @property
    def with_copy(self) -> int:
        """The same policy with a second copy of its base as the reference."""
        return 2 * self.base + self.adapters

    def describe(self) -> str:
        """Return a line that compares the memory with that of two alternatives."""
        held, pair, copy = (
            size / 2**20 for size in (self.policy_and_reference, self.bf16_pair, self.with_copy)
        )
        return (
            f"policy + reference {held:.1f} MiB: {held / pair:.3f} of bf16 policy + bf16 copy "
            f"({pair:.1f} MiB), {held / copy:.3f} of the same policy + a copy ({copy:.1f} MiB)"
        )


def footprint(policy: Policy) -> Footprint:
    """Count the weights of a built policy. Tensors that are shared count once."""
    seen: set[int] = set()

    def size(tensor: Tensor) -> int:
        if tensor.data_ptr() in seen and tensor.numel():
            return 0
        seen.add(tensor.data_ptr())
        return tensor.numel() * tensor.element_size()

    # weights of modules, by name
    sizes = {"base": 0, "adapters": 0, "parts": 0, "reference": 0}
    numbers = 0
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            kind = "adapters"
        elif name.startswith(("mtp.", "critic.")):
            kind = "parts"
        elif name.startswith("reference_network."):
            kind = "reference"
        else:
            kind = "base"
            numbers += _numbers(weight)
        sizes[kind] += size(weight)
    # scales of quantised layers, and tensors outside of modules
    network: Any = getattr(policy, "network", None)
    if isinstance(network, nn.Module):
        sizes["base"] += sum(size(tensor) for _, tensor in quantised_tensors(network))
    sizes["reference"] += sum(size(tensor) for tensor in frozen_tensors(policy))
    return Footprint(numbers=numbers, **sizes)


def _numbers(weight: Tensor) -> int:
    shape: Any = getattr(getattr(weight, "quant_state", None), "shape", None)
    return weight.numel() if shape is None else shape.numel()
