"""The positions that a head computes, out of a leading shape with a mask."""

import torch
from torch import Tensor


class Positions:
    """The positions to compute: flattens any leading shape to them, and scatters results back.

    The others get 0. Under `torch.compile` the number of positions would be an unknown shape. So
    all of them are computed, the masked ones from zeros, and values of ids are not checked.

    Args:
        lead: Leading shape, such as ``[B, T]``.
        mask: Positions to compute, of the leading shape. None: all.
    """

    def __init__(self, lead: torch.Size, mask: Tensor | None) -> None:
        self.lead = lead
        self.index = self.masked = None
        if mask is not None and torch.compiler.is_compiling():
            self.masked = ~mask.flatten()
        elif mask is not None:
            self.index = mask.flatten().nonzero().squeeze(-1)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of the positions to compute, ``[N, ...]``."""
        flat = values.reshape(-1, *values.shape[len(self.lead) :])
        if self.masked is not None:
            return self._clear(flat)
        return flat if self.index is None else flat.index_select(0, self.index)

    def gather_ids(self, name: str, values: Tensor, vocabulary: int) -> Tensor:
        """Return ids as int64 after a check that they are in the vocabulary."""
        ids = self.gather(values).long()
        if ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"`{name}` must be in [0, {vocabulary}) wherever it is scored, "
                    f"got [{low}, {high}]"
                )
        return ids

    def scatter(self, values: Tensor) -> Tensor:
        """Return ``[N, ...]`` in the leading shape, 0 at the positions that were not computed."""
        if self.masked is not None:
            values = self._clear(values)
        elif self.index is not None:
            values = values.new_zeros(self.lead.numel(), *values.shape[1:]).index_copy(
                0, self.index, values
            )
        return values.reshape(*self.lead, *values.shape[1:])

    def _clear(self, values: Tensor) -> Tensor:
        """Set the masked positions to 0, so that a NaN there reaches no value and no gradient."""
        assert self.masked is not None
        return values.masked_fill(self.masked.view(-1, *(1 for _ in values.shape[1:])), 0)
