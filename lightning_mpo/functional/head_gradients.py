"""The hand-written gradients of ``heads.py``: no pass holds more than one chunk of logits.

With z the logits, p their softmax and z' = dz/draw the slope of scale, soft cap and temperature,
per token:

    d log π(o) / dh = z'_o W_o - m,           m = Σ_v p_v z'_v W_v
    d H / dh        = e,                      e = -Σ_v p_v (log p_v + H) z'_v W_v

If weight and bias are frozen, m (and e) are computed in the forward pass, where p is at hand. That
is one more matrix product, a saved ``[N, D]``, and a backward pass without logits. If one of them
is trained, the backward pass computes the logits of each chunk again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_mpo.functional.head_logits import LogitForm, RawLogits, product_dtypes
from lightning_mpo.functional.supports import top_k

BARRED = -1e9
"""Logit of a barred id. Its probability is exactly 0, and p · log p and p · z' are 0, not nan."""


class Scan(NamedTuple):
    """Options of one pass over all tokens."""

    form: LogitForm
    chunk: int  # tokens per chunk
    learning: bool  # autograd is on
    entropy: bool  # the entropy is computed
    entropy_grad: bool  # and carries a gradient
    learnt_ids: int  # the first ids of each token, whose log-probs carry a gradient
    barred: Tensor | None = None  # [V], True for ids of probability 0

    def logits(self, raw: Tensor) -> Tensor:
        """Return the logits, in the memory of the raw products."""
        logits = self.form.logits_(raw)
        return logits if self.barred is None else logits.masked_fill_(self.barred, BARRED)

    def fill_barred(self, values: Tensor, ids: Tensor, value: float) -> Tensor:
        """Return values of ids, with another value where the id is barred."""
        return values if self.barred is None else values.masked_fill(self.barred[ids], value)


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
        scan: Scan,
    ) -> tuple[Tensor, Tensor]:
        """Scan the tokens; save mean rows if they spare the backward pass the logits."""
        need_hidden, *need_head = ctx.needs_input_grad[:5]
        ctx.scan, ctx.trained = scan, any(need_head)
        form, want_entropy = scan.form, scan.entropy
        # results, and the rows m and e of a frozen head
        rows = 1 + scan.entropy_grad if scan.learning and need_hidden and not ctx.trained else 0
        raw = RawLogits(hidden, weight, bias, inner, up)
        logprobs = ids.new_empty(ids.shape, dtype=raw.wide)
        entropy = ids.new_zeros(len(ids), dtype=raw.wide)
        slopes = torch.full_like(logprobs, form.scale / form.temperature)
        means = raw.matrix.new_empty(rows, *hidden.shape)
        with _no_autocast(hidden):
            for part in _chunks(len(ids), scan.chunk):
                # log-probs
                logits = scan.logits(raw(part))
                logp = logits.log_softmax(-1)
                chosen = logp.gather(-1, ids[part])
                logprobs[part] = scan.fill_barred(chosen, ids[part], -torch.inf)
                # entropies
                if not (rows or want_entropy):
                    continue
                p = logp.exp()
                if want_entropy:
                    entropy[part] = -_dot(p, logp)
                # rows for the backward pass, in the memory of `logp` and `p`
                if not rows:
                    continue
                slope = form.slope(logits)
                if isinstance(slope, Tensor):
                    slopes[part] = slope.gather(-1, ids[part])
                if rows == 2:
                    surprise = logp.add_(entropy[part].unsqueeze(-1)).mul_(p).mul_(slope)
                    means[1, part] = surprise.to(raw.narrow) @ raw.matrix
                means[0, part] = p.mul_(slope).to(raw.narrow) @ raw.matrix
        if not scan.entropy_grad:
            ctx.mark_non_differentiable(entropy)
        # a frozen head's backward pass does not read the hidden states
        read_hidden = hidden if ctx.trained else hidden.new_empty(0)
        learnt = scan.learnt_ids
        ctx.save_for_backward(
            *(read_hidden, weight, bias, inner, up),
            *(ids[:, :learnt], entropy, slopes[:, :learnt], means),
        )
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Combine saved rows if the head is frozen, else go through the logits again."""
        with _no_autocast(grad_logprobs):
            learnt = grad_logprobs[:, : ctx.scan.learnt_ids]
            grads = (_recompute if ctx.trained else _combine)(ctx, learnt, grad_entropy)
        return *grads, None, None


@torch.no_grad()
def count_larger(raw: RawLogits, ids: Tensor, chunk: int, barred: Tensor | None = None) -> Tensor:
    """Count the ids of the vocabulary [N] whose raw logit is larger than that of `ids` [N, 1].

    Ids that are barred [V] are not counted.
    """
    ranks = ids.new_empty(len(ids))
    with _no_autocast(ids):
        for part in _chunks(len(ids), chunk):
            logits = raw(part)
            larger = logits > logits.gather(1, ids[part])
            ranks[part] = (larger if barred is None else larger & ~barred).sum(1)
    return ranks


@torch.no_grad()
def largest(raw: RawLogits, k: int, chunk: int, barred: Tensor | None = None) -> Tensor:
    """Return the k ids [N, k] with the largest raw logits; of equal ones the lowest id first.

    Ids that are barred [V] come last.
    """
    ids = torch.empty(len(raw.hidden), k, dtype=torch.int32, device=raw.hidden.device)
    with _no_autocast(ids):
        for part in _chunks(len(ids), chunk):
            logits = raw(part)
            ids[part] = top_k(
                logits if barred is None else logits.masked_fill_(barred, -torch.inf), k
            )
    return ids


class RowProducts(torch.autograd.Function):
    """Products [N, K] of a vector per token [N, D] with the rows of a matrix [V, D] that ids name.

    No other row is read.

    out_k = h W[id_k];   dh = Σ_k g_k W[id_k],   dW[v] = Σ_{id_k = v} g_k h
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, chunk: int) -> Tensor:
        """Gather rows and multiply, chunk by chunk."""
        narrow, wide = product_dtypes(hidden, weight)
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
                    grad, weight, ids, ctx.chunk, product_dtypes(hidden, weight)[0]
                ).to(hidden.dtype)
            if need_weight:
                grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
                for part in _chunks(len(ids), ctx.chunk):
                    outer = grad[part].unsqueeze(-1) * hidden[part].to(grad.dtype).unsqueeze(1)
                    grad_weight.index_add_(0, ids[part].flatten(), outer.flatten(0, 1))
                grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _combine(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of the hidden states: Σ_j g_j z'_j W_j - (Σ_j g_j) m + g_H e."""
    hidden, weight, *_, ids, _, slopes, means = ctx.saved_tensors
    grad_logprobs = ctx.scan.fill_barred(grad_logprobs, ids, 0.0)
    grad = _weighted_rows(grad_logprobs * slopes, weight, ids, ctx.scan.chunk, means.dtype)
    grad = grad - grad_logprobs.sum(-1, keepdim=True) * means[0]
    if len(means) == 2:
        grad = grad - grad_entropy.unsqueeze(-1) * means[1]
    return grad.to(hidden.dtype), None, None, None, None


def _recompute(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the logits again, chunk by chunk, and return all gradients."""
    *inputs, ids, entropy, _, _ = ctx.saved_tensors
    grad_logprobs = ctx.scan.fill_barred(grad_logprobs, ids, 0.0)
    raw, form = RawLogits(*inputs), ctx.scan.form
    grads = _Gradients(raw, inputs, ctx.needs_input_grad)
    for part in _chunks(len(ids), ctx.scan.chunk):
        logits = ctx.scan.logits(raw(part))
        slope, logp = form.slope(logits), logits.log_softmax(-1)
        factor = -grad_logprobs[part].sum(-1, keepdim=True)
        if ctx.scan.entropy_grad:
            more = grad_entropy[part].unsqueeze(-1)
            grad = logp.exp() * (factor - more * (logp + entropy[part].unsqueeze(-1)))
        else:
            grad = logp.exp_().mul_(factor)
        grad.scatter_add_(-1, ids[part], grad_logprobs[part]).mul_(slope)
        grads.add(part, grad)
    return grads.result()


class _Gradients:
    """Sums the gradients of hidden state, weight, bias and adapter over chunks of raw logits."""

    def __init__(self, raw: RawLogits, inputs: list[Any], needed: tuple[bool, ...]) -> None:
        self.raw, self.inputs = raw, inputs
        self.weight, self.bias, self.up = (
            torch.zeros_like(inputs[i], dtype=raw.wide) if needed[i] else None for i in (1, 2, 4)
        )
        self.hidden = torch.empty_like(inputs[0]) if needed[0] else None
        self.inner = torch.empty_like(inputs[3]) if needed[3] else None

    def add(self, part: slice, grad: Tensor) -> None:
        """Add the gradient that reaches all inputs from the raw logits of one chunk."""
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
        """Return the gradients in the dtypes of their inputs."""
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


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
