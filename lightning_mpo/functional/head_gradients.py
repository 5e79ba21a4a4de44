"""The gradients behind ``heads.py``, by hand, so that no pass holds more than one chunk of logits.

With z the logits, p their softmax and z' = dz/draw the slope of scale, soft cap and temperature, per token:

    d log π(o) / dh = z'_o W_o - m,           m = Σ_v p_v z'_v W_v
    d H / dh        = e,                      e = -Σ_v p_v (log p_v + H) z'_v W_v

If weight and bias are frozen, m (and e) are computed in the forward pass, where p is at hand: one more matrix product,
a saved ``[N, D]``, and a backward pass without logits. If one of them is trained, the backward pass computes the logits
of each chunk again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_mpo.functional.supports import top_k


class _Options(NamedTuple):
    temperature: float
    scale: float
    softcap: float | None


class LogitForm(_Options):
    """How raw products become logits: z = cap(scale · raw) / temperature."""

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
        """Return the logits, in the memory of the raw ones."""
        if self.softcap is not None:
            return raw.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return raw if self.scale == self.temperature else raw.mul_(self.scale / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return d logits / d raw, a number if there is no soft cap."""
        constant = self.scale / self.temperature
        if self.softcap is None:
            return constant
        return constant * (1 - (logits * (self.temperature / self.softcap)).square_())


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
        self.narrow, self.wide = _dtypes(hidden, weight)
        self.hidden, self.matrix, self.bias = hidden, weight.to(self.narrow), bias
        self.inner, self.up = inner, up

    def __call__(self, part: slice) -> Tensor:
        raw = (self.hidden[part].to(self.narrow) @ self.matrix.T).to(self.wide)
        if self.bias is not None:
            raw.add_(self.bias)
        if self.inner is not None and self.up is not None:
            raw.add_(self.inner[part] @ self.up.T)
        return raw


class FullHead(torch.autograd.Function):
    """Log-probabilities [N, J] of ids and the entropy [N] of the full softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inner: Tensor | None,
        up: Tensor | None,
        ids: Tensor,
        form: LogitForm,
        chunk: int,
        learning: bool,
        entropy_grad: bool,
        entropy_wanted: bool,
        learnt: int,
    ) -> tuple[Tensor, Tensor]:
        """Scan the tokens; keep the mean rows if that saves the backward pass the logits. The first `learnt` ids learn."""
        need_hidden, *need_head = ctx.needs_input_grad[:5]
        ctx.form, ctx.chunk, ctx.trained, ctx.entropy_grad = (
            form,
            chunk,
            any(need_head),
            entropy_grad,
        )
        rows = 1 + entropy_grad if learning and need_hidden and not ctx.trained else 0
        raw = RawLogits(hidden, weight, bias, inner, up)
        logprobs, entropy = (
            ids.new_empty(ids.shape, dtype=raw.wide),
            ids.new_zeros(len(ids), dtype=raw.wide),
        )
        slopes = torch.full_like(logprobs, form.scale / form.temperature)
        means = raw.matrix.new_empty(rows, *hidden.shape)
        with _no_autocast(hidden):
            for part in _chunks(len(ids), chunk):
                logits = form.logits_(raw(part))
                logp = logits.log_softmax(-1)
                logprobs[part] = logp.gather(-1, ids[part])
                if not (rows or entropy_wanted):
                    continue
                p = logp.exp()
                if entropy_wanted:
                    entropy[part] = -_dot(p, logp)
                if not rows:
                    continue
                slope = form.slope(logits)
                if isinstance(slope, Tensor):
                    slopes[part] = slope.gather(-1, ids[part])
                if rows == 2:
                    surprise = logp.add_(entropy[part].unsqueeze(-1)).mul_(p).mul_(slope)
                    means[1, part] = surprise.to(raw.narrow) @ raw.matrix
                means[0, part] = p.mul_(slope).to(raw.narrow) @ raw.matrix
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        kept = hidden if ctx.trained else hidden.new_empty(0)
        ctx.save_for_backward(
            kept, weight, bias, inner, up, ids[:, :learnt], entropy, slopes[:, :learnt], means
        )
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Combine saved rows if the head is frozen, else go through the logits again."""
        with _no_autocast(grad_logprobs):
            learnt = grad_logprobs[:, : ctx.saved_tensors[5].shape[1]]
            grads = (_relive if ctx.trained else _combine)(ctx, learnt, grad_entropy)
        return *grads, None, None, None, None, None, None, None


@torch.no_grad()
def count_larger(raw: RawLogits, ids: Tensor, chunk: int) -> Tensor:
    """Count the ids [N] whose raw logit is larger than that of `ids` [N, 1]."""
    ranks = ids.new_empty(len(ids))
    with _no_autocast(ids):
        for part in _chunks(len(ids), chunk):
            logits = raw(part)
            ranks[part] = (logits > logits.gather(1, ids[part])).sum(1)
    return ranks


@torch.no_grad()
def largest(raw: RawLogits, k: int, chunk: int) -> Tensor:
    """Pick the k ids [N, k] with the largest raw logits; of equal ones the lowest id first."""
    ids = torch.empty(len(raw.hidden), k, dtype=torch.int32, device=raw.hidden.device)
    with _no_autocast(ids):
        for part in _chunks(len(ids), chunk):
            ids[part] = top_k(raw(part), k)
    return ids


class RowProducts(torch.autograd.Function):
    """Products [N, K] of a vector per token [N, D] with the rows of a matrix [V, D] that its ids name; no other is read.

    out_k = h W[id_k];   dh = Σ_k g_k W[id_k],   dW[v] = Σ_{id_k = v} g_k h
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, chunk: int) -> Tensor:
        """Gather rows and multiply, chunk by chunk."""
        narrow, wide = _dtypes(hidden, weight)
        products = ids.new_empty(ids.shape, dtype=wide)
        with _no_autocast(hidden):
            for part in _chunks(len(ids), chunk):
                column = hidden[part].to(narrow).unsqueeze(-1)
                products[part] = (
                    torch.bmm(_rows(weight, ids[part], narrow), column).squeeze(-1).to(wide)
                )
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, weight, ids)
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gather the rows again; add to the rows of one gradient if the matrix is trained."""
        hidden, weight, ids = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = grad_weight = None
        with _no_autocast(grad):
            if need_hidden:
                grad_hidden = _weighted_rows(
                    grad, weight, ids, ctx.chunk, _dtypes(hidden, weight)[0]
                ).to(hidden.dtype)
            if need_weight:
                grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
                for part in _chunks(len(ids), ctx.chunk):
                    outer = grad[part].unsqueeze(-1) * hidden[part].to(grad.dtype).unsqueeze(1)
                    grad_weight.index_add_(0, ids[part].flatten(), outer.flatten(0, 1))
                grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _combine(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of the hidden states from saved rows: Σ_j g_j z'_j W_j - (Σ_j g_j) m + g_H e."""
    hidden, weight, *_, ids, _, slopes, means = ctx.saved_tensors
    grad = _weighted_rows(grad_logprobs * slopes, weight, ids, ctx.chunk, means.dtype)
    grad = grad - grad_logprobs.sum(-1, keepdim=True) * means[0]
    if len(means) == 2:
        grad = grad - grad_entropy.unsqueeze(-1) * means[1]
    return grad.to(hidden.dtype), None, None, None, None


def _relive(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    """Return all gradients from logits that are computed again, chunk by chunk."""
    *inputs, ids, entropy, _, _ = ctx.saved_tensors
    raw = RawLogits(*inputs)
    grads = _Gradients(raw, inputs, ctx.needs_input_grad)
    for part in _chunks(len(ids), ctx.chunk):
        logits = ctx.form.logits_(raw(part))
        slope, logp = ctx.form.slope(logits), logits.log_softmax(-1)
        factor = -grad_logprobs[part].sum(-1, keepdim=True)
        if ctx.entropy_grad:
            more = grad_entropy[part].unsqueeze(-1)
            grad = logp.exp() * (factor - more * (logp + entropy[part].unsqueeze(-1)))
        else:
            grad = logp.exp_().mul_(factor)
        grad.scatter_add_(-1, ids[part], grad_logprobs[part]).mul_(slope)
        grads.add(part, grad)
    return grads.result()


class _Gradients:
    """Collects the gradients of hidden state, weight, bias and adapter from those of raw logits, chunk by chunk."""

    def __init__(self, raw: RawLogits, inputs: list[Any], needed: tuple[bool, ...]) -> None:
        self.raw, self.inputs = raw, inputs
        self.weight, self.bias, self.up = (
            torch.zeros_like(inputs[i], dtype=raw.wide) if needed[i] else None for i in (1, 2, 4)
        )
        self.hidden = torch.empty_like(inputs[0]) if needed[0] else None
        self.inner = torch.empty_like(inputs[3]) if needed[3] else None

    def add(self, part: slice, grad: Tensor) -> None:
        """Take the gradient of the raw logits of one chunk."""
        raw = self.raw
        if self.hidden is not None:
            self.hidden[part] = (grad.to(raw.narrow) @ raw.matrix).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.addmm_(grad.T, raw.hidden[part].to(raw.wide))
        if self.bias is not None:
            self.bias += grad.sum(0)
        if self.inner is not None and raw.up is not None:
            self.inner[part] = grad.to(raw.up.dtype) @ raw.up
        if self.up is not None and raw.inner is not None:
            self.up.addmm_(grad.T, raw.inner[part].to(raw.wide))

    def result(self) -> tuple[Tensor | None, ...]:
        """Return them in the dtypes of what they belong to."""
        grads = (self.hidden, self.weight, self.bias, self.inner, self.up)
        return tuple(
            None if g is None else g.to(x.dtype) for g, x in zip(grads, self.inputs, strict=True)
        )


def _weighted_rows(
    factors: Tensor, weight: Tensor, ids: Tensor, chunk: int, dtype: torch.dtype
) -> Tensor:
    """Return Σ_k factor_k W[id_k] per token, [N, D], in the dtype of the factors."""
    sums = factors.new_empty(len(ids), weight.shape[1])
    for part in _chunks(len(ids), chunk):
        sums[part] = torch.bmm(
            factors[part].unsqueeze(1).to(dtype), _rows(weight, ids[part], dtype)
        ).squeeze(1)
    return sums


def _rows(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.index_select(0, ids.flatten()).view(*ids.shape, -1).to(dtype)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1)


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the narrower dtype, for products, and the one for everything after them."""
    narrow = hidden.dtype if hidden.element_size() < weight.element_size() else weight.dtype
    return narrow, torch.float64 if narrow == torch.float64 else torch.float32


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
