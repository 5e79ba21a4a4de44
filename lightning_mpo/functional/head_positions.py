"""What the head functions share: the positions to compute, the size of a chunk, and what raw logits are made of."""

from typing import Any

import torch
from torch import Tensor

from lightning_mpo.functional.low_rank import LowRank
from lightning_mpo.functional.sharded_rows import whole

FULL_CHUNK_BYTES = 64 * 2**20
"""Default size of one chunk of float32 logits."""
SUPPORT_CHUNK_BYTES = 4 * 2**20
"""Default size of one chunk of gathered weight rows."""


class Positions:
    """The positions to compute: flattens any leading shape to them and puts results back, 0 elsewhere.

    Under `torch.compile`, where the number of positions would be a shape that is not known, all of them are computed,
    the masked ones from zeros; values of ids are not checked.
    """

    def __init__(self, lead: torch.Size, mask: Tensor | None) -> None:
        self.lead = lead
        self.index = self.hidden = None
        if mask is not None and torch.compiler.is_compiling():
            self.hidden = ~mask.flatten()
        elif mask is not None:
            self.index = mask.flatten().nonzero().squeeze(-1)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of the positions to compute, [N, ...]."""
        flat = values.reshape(-1, *values.shape[len(self.lead) :])
        if self.hidden is not None:
            return self._clear(flat)
        return flat if self.index is None else flat.index_select(0, self.index)

    def gather_ids(self, name: str, values: Tensor, vocabulary: int) -> Tensor:
        """Return ids as int64 after a check that they are in the vocabulary."""
        ids = self.gather(values).long()
        if ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"`{name}` must be in [0, {vocabulary}) wherever it is scored, got [{low}, {high}]"
                )
        return ids

    def scatter(self, values: Tensor) -> Tensor:
        """Return values to their places in the leading shape."""
        if self.hidden is not None:
            values = self._clear(values)
        elif self.index is not None:
            values = values.new_zeros(self.lead.numel(), *values.shape[1:]).index_copy(
                0, self.index, values
            )
        return values.reshape(*self.lead, *values.shape[1:])

    def _clear(self, values: Tensor) -> Tensor:
        """Return [all positions, ...] with 0 at the masked ones; a NaN there reaches no value and no gradient."""
        assert self.hidden is not None
        return values.masked_fill(self.hidden.view(-1, *(1 for _ in values.shape[1:])), 0)


def adapter_parts(adapter: LowRank | None) -> dict[str, Any]:
    """Return the tensors of an adapter by name, for a check of their shapes."""
    return {} if adapter is None else {"down_RD": adapter.down_RD, "up_VR": adapter.up_VR}


def raw_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: LowRank | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return what raw logits are made of: hidden states, weight, bias, and an adapter's u and B."""
    inner, up = (None, None) if adapter is None else (adapter.inner(hidden), whole(adapter.up_VR))
    return hidden, whole(weight), whole(bias), inner, up


def tokens_per_chunk(chunk_size: int | None, budget: int, bytes_per_token: int) -> int:
    if chunk_size is None:
        return max(1, budget // max(1, bytes_per_token))
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    return chunk_size
