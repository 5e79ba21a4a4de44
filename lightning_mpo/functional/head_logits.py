"""A head as a value, and the raw products and the form that its logits consist of."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mpo.functional.low_rank import LowRank
from lightning_mpo.functional.shapes import check
from lightning_mpo.functional.sharded_rows import full_weight


class _Options(NamedTuple):
    temperature: float
    scale: float
    softcap: float | None


class LogitForm(_Options):
    """The step from raw products to logits: z = cap(scale · raw) / temperature."""

    def __new__(cls, temperature: float, scale: float, softcap: float | None) -> "LogitForm":
        """Check the options and keep them."""
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"`softcap` must be above 0, got {softcap}")
        return super().__new__(cls, temperature, scale, softcap)

    def logits(self, raw: Tensor) -> Tensor:
        """Return the logits, by operations that autograd knows."""
        if self.softcap is not None:
            return (raw * (self.scale / self.softcap)).tanh() * (self.softcap / self.temperature)
        return raw if self.scale == self.temperature else raw * (self.scale / self.temperature)

    def logits_(self, raw: Tensor) -> Tensor:
        """Return the logits, in the memory of the raw products."""
        if self.softcap is not None:
            return raw.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return raw if self.scale == self.temperature else raw.mul_(self.scale / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return d logits / d raw, a number if there is no soft cap."""
        constant = self.scale / self.temperature
        if self.softcap is None:
            return constant
        return constant * (1 - (logits * (self.temperature / self.softcap)).square_())


@dataclass(frozen=True)
class Head:
    """An unembedding and the form of its logits (docs/algorithms.md 2.1).

        z = cap(scale · (h Wᵀ + b)) / temperature

    Args:
        weight_VD: Rows of the unembedding, shape ``[V, D]``; may be sharded over processes.
        bias_V: Bias of the unembedding, finite, shape ``[V]``.
        adapter: Low-rank adapter of the unembedding.
        temperature: Sampling temperature, above 0.
        scale: Factor on the logits, before the soft cap.
        softcap: Soft cap of the logits, above 0. None: no cap.
        chunk_size: Tokens per chunk. None: as many as make 64 MiB of logits over the vocabulary, or
            4 MiB of rows of a support.
        barred_V: True for ids of probability 0, bool, shape ``[V]``. The softmax is taken over the
            other ids. The mask acts behind the soft cap, which would make an infinite bias finite.

    Raises:
        ValueError: If an option is out of range.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    adapter: LowRank | None = None
    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    chunk_size: int | None = None
    barred_V: Tensor | None = None

    def __post_init__(self) -> None:
        LogitForm(self.temperature, self.scale, self.softcap)
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1, got {self.chunk_size}")

    @property
    def form(self) -> LogitForm:
        """The step from raw products to logits."""
        return LogitForm(self.temperature, self.scale, self.softcap)

    def check(self, hidden_BTD: Tensor, **tensors: Tensor | None) -> dict[str, int]:
        """Check the shapes of all tensors together; ``BT`` stands for any leading shape.

        Args:
            hidden_BTD: Hidden states, shape ``[B, T, D]``.
            **tensors: The other arguments of a head function, by name; None is skipped.

        Returns:
            The size of every letter.

        Raises:
            ValueError: If a shape differs.
        """
        adapter = self.adapter
        return check(
            None,
            batch="BT",
            hidden_BTD=hidden_BTD,
            weight_VD=self.weight_VD,
            bias_V=self.bias_V,
            barred_mask_V=self.barred_V,
            down_RD=None if adapter is None else adapter.down_RD,
            up_VR=None if adapter is None else adapter.up_VR,
            **tensors,
        )

    def tokens_per_chunk(self, budget: int, bytes_per_token: int) -> int:
        """Return `chunk_size`, or as many tokens as a budget in bytes allows."""
        if self.chunk_size is None:
            return max(1, budget // max(1, bytes_per_token))
        return self.chunk_size

    def raw_inputs(
        self, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return the inputs of raw logits: hidden states, weight, bias, adapter's u and B."""
        weight, bias = full_weight(self.weight_VD), full_weight(self.bias_V)
        if self.adapter is None:
            return hidden, weight, bias, None, None
        return hidden, weight, bias, self.adapter.inner(hidden), full_weight(self.adapter.up_VR)


class RawLogits:
    """h Wᵀ + b, and u Bᵀ of a low-rank adapter on top, for one chunk of tokens at a time."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inner: Tensor | None,
        up: Tensor | None,
    ) -> None:
        self.narrow, self.wide = product_dtypes(hidden, weight)
        self.hidden, self.matrix, self.bias = hidden, weight.to(self.narrow), bias
        self.inner, self.up = inner, up

    def __call__(self, part: slice) -> Tensor:
        raw = (self.hidden[part].to(self.narrow) @ self.matrix.T).to(self.wide)
        if self.bias is not None:
            raw.add_(self.bias)
        if self.inner is not None and self.up is not None:
            raw.add_(self.inner[part] @ self.up.T)
        return raw


def product_dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the narrower dtype, for products, and the dtype of everything after them."""
    narrow = hidden.dtype if hidden.element_size() < weight.element_size() else weight.dtype
    return narrow, torch.float64 if narrow == torch.float64 else torch.float32
