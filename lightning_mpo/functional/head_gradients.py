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
        """Return the logits; may work in place."""
        if self.softcap is not None:
            return raw.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return raw if self.scale == self.temperature else raw.mul_(self.scale / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return d logits / d raw, a number if there is no soft cap."""
        constant = self.scale / self.temperature
        if self.softcap is None:
            return constant
        return constant * (1 - (logits * (self.temperature / self.softcap)).square_())


class FullHead(torch.autograd.Function):
    """Log-probabilities [N, J] of ids and the entropy [N] of the full softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        form: LogitForm,
        chunk: int,
        learning: bool,
        entropy_grad: bool,
        entropy_wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        """Scan the tokens; keep the mean rows if that saves the backward pass the logits."""
        need_hidden, *need_head = ctx.needs_input_grad[:3]
        ctx.form, ctx.chunk, ctx.trained, ctx.entropy_grad = form, chunk, any(need_head), entropy_grad
        rows = 1 + entropy_grad if learning and need_hidden and not ctx.trained else 0
        narrow, wide = _dtypes(hidden, weight)
        matrix = weight.to(narrow)
        logprobs, entropy = ids.new_empty(ids.shape, dtype=wide), ids.new_zeros(len(ids), dtype=wide)
        slopes = torch.full_like(logprobs, form.scale / form.temperature)
        means = matrix.new_empty(rows, *hidden.shape)
        with _no_autocast(hidden):
            for part in _chunks(len(ids), chunk):
                logits = form.logits(_raw(hidden[part].to(narrow), matrix, bias, wide))
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
                    means[1, part] = surprise.to(narrow) @ matrix
                means[0, part] = p.mul_(slope).to(narrow) @ matrix
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        kept = hidden if ctx.trained else hidden.new_empty(0)
        ctx.save_for_backward(kept, weight, bias, ids, entropy, slopes, means)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """Combine saved rows if the head is frozen, else go through the logits again."""
        with _no_autocast(grad_logprobs):
            grads = (_relive if ctx.trained else _combine)(ctx, grad_logprobs, grad_entropy)
        return *grads, None, None, None, None, None, None


@torch.no_grad()
def count_larger(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, chunk: int) -> Tensor:
    """Count the ids [N] whose raw logit is larger than that of `ids` [N, 1]."""
    narrow, wide = _dtypes(hidden, weight)
    matrix, ranks = weight.to(narrow), ids.new_empty(len(ids))
    with _no_autocast(hidden):
        for part in _chunks(len(ids), chunk):
            raw = _raw(hidden[part].to(narrow), matrix, bias, wide)
            ranks[part] = (raw > raw.gather(1, ids[part])).sum(1)
    return ranks


@torch.no_grad()
def largest(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, chunk: int) -> Tensor:
    """Pick the k ids [N, k] with the largest raw logits; of equal ones the lowest id first."""
    narrow, wide = _dtypes(hidden, weight)
    matrix, ids = weight.to(narrow), torch.empty(len(hidden), k, dtype=torch.int32, device=hidden.device)
    with _no_autocast(hidden):
        for part in _chunks(len(hidden), chunk):
            ids[part] = top_k(_raw(hidden[part].to(narrow), matrix, bias, wide), k)
    return ids


class SupportHead(torch.autograd.Function):
    """Logits [N, K] of the ids of a support; only their rows of the weight are read."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, form: LogitForm, chunk: int
    ) -> Tensor:
        """Gather rows and multiply, chunk by chunk."""
        narrow, wide = _dtypes(hidden, weight)
        logits = ids.new_empty(ids.shape, dtype=wide)
        with _no_autocast(hidden):
            for part in _chunks(len(ids), chunk):
                column = hidden[part].to(narrow).unsqueeze(-1)
                raw = torch.bmm(_rows(weight, ids[part], narrow), column).squeeze(-1).to(wide)
                logits[part] = form.logits(raw if bias is None else raw.add_(bias[ids[part]]))
        ctx.form, ctx.chunk = form, chunk
        ctx.save_for_backward(hidden, weight, bias, ids, logits)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        """Gather the rows again; add to the rows of one gradient if the weight is trained."""
        hidden, weight, bias, ids, logits = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad = grad_logits * ctx.form.slope(logits)
        grad_hidden = grad_weight = grad_bias = None
        with _no_autocast(grad):
            if need_hidden:
                grad_hidden = _weighted_rows(grad, weight, ids, ctx.chunk, _dtypes(hidden, weight)[0]).to(hidden.dtype)
            if need_weight:
                grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
                for part in _chunks(len(ids), ctx.chunk):
                    outer = grad[part].unsqueeze(-1) * hidden[part].to(grad.dtype).unsqueeze(1)
                    grad_weight.index_add_(0, ids[part].flatten(), outer.flatten(0, 1))
                grad_weight = grad_weight.to(weight.dtype)
            if need_bias:
                grad_bias = torch.zeros_like(bias, dtype=grad.dtype).index_add_(0, ids.flatten(), grad.flatten())
                grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _combine(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None]:
    """Return the gradient of the hidden states from saved rows: Σ_j g_j z'_j W_j - (Σ_j g_j) m + g_H e."""
    hidden, weight, _, ids, _, slopes, means = ctx.saved_tensors
    grad = _weighted_rows(grad_logprobs * slopes, weight, ids, ctx.chunk, means.dtype)
    grad = grad - grad_logprobs.sum(-1, keepdim=True) * means[0]
    if len(means) == 2:
        grad = grad - grad_entropy.unsqueeze(-1) * means[1]
    return grad.to(hidden.dtype), None, None


def _relive(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    """Return all gradients from logits that are computed again, chunk by chunk."""
    hidden, weight, bias, ids, entropy, _, _ = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    narrow, wide = _dtypes(hidden, weight)
    matrix = weight.to(narrow)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
    grad_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
    for part in _chunks(len(ids), ctx.chunk):
        logits = ctx.form.logits(_raw(hidden[part].to(narrow), matrix, bias, wide))
        slope, logp = ctx.form.slope(logits), logits.log_softmax(-1)
        factor = -grad_logprobs[part].sum(-1, keepdim=True)
        if ctx.entropy_grad:
            more = grad_entropy[part].unsqueeze(-1)
            grad = logp.exp() * (factor - more * (logp + entropy[part].unsqueeze(-1)))
        else:
            grad = logp.exp_().mul_(factor)
        grad.scatter_add_(-1, ids[part], grad_logprobs[part]).mul_(slope)
        if grad_hidden is not None:
            grad_hidden[part] = (grad.to(narrow) @ matrix).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight.addmm_(grad.T, hidden[part].to(wide))
        if grad_bias is not None:
            grad_bias += grad.sum(0)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
    )


def _weighted_rows(factors: Tensor, weight: Tensor, ids: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """Return Σ_k factor_k W[id_k] per token, [N, D], in the dtype of the factors."""
    sums = factors.new_empty(len(ids), weight.shape[1])
    for part in _chunks(len(ids), chunk):
        sums[part] = torch.bmm(factors[part].unsqueeze(1).to(dtype), _rows(weight, ids[part], dtype)).squeeze(1)
    return sums


def _rows(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.index_select(0, ids.flatten()).view(*ids.shape, -1).to(dtype)


def _raw(hidden: Tensor, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    raw = (hidden @ matrix.T).to(dtype)
    return raw if bias is None else raw.add_(bias)


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
