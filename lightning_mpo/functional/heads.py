"""From hidden states to log-probabilities and entropies, without ever holding a ``[B, T, V]`` tensor.

The full head takes the softmax over the vocabulary, a chunk of tokens at a time. The support head takes it over the few
ids that were stored at rollout time (RLPT, Reinforcement Learning with Promising Tokens, arXiv:2602.03195), and touches
only those rows of the weight, so that its cost does not grow with V. Both describe the same logits,

    z = cap(scale · (h W + b)) / temperature,   cap(x) = softcap · tanh(x / softcap)     (Gemma 2, arXiv:2408.00118)

(with a low-rank adapter, W + s · B A stands for W), and both have a hand-written gradient (``head_gradients.py``). Matrix
products run in the narrower dtype of hidden state and weight, also under autocast; everything after them in float32
(float64 if both are float64).

``torch.compile(..., fullgraph=True)`` takes the support functions, with backward. What differs: checks that read values
(ids in the vocabulary, tokens in their support) are left out, and masked positions are computed from zeros instead of
being skipped. The loop over chunks is unrolled, so give a large ``chunk_size``. The full head is not meant to be
compiled: its time is in one matrix product.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_mpo.functional.head_gradients import FullHead, LogitForm, RawLogits, RowProducts, count_larger, largest
from lightning_mpo.functional.low_rank import LowRank
from lightning_mpo.functional.shapes import check
from lightning_mpo.functional.sharded_rows import rows_of, whole

FULL_CHUNK_BYTES = 64 * 2**20
"""Default size of one chunk of float32 logits."""
SUPPORT_CHUNK_BYTES = 4 * 2**20
"""Default size of one chunk of gathered weight rows."""


def full_logprobs(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    tokens_BT: Tensor,
    *,
    temperature: float = 1.0,
    mask_BT: Tensor | None = None,
    bias_V: Tensor | None = None,
    adapter: LowRank | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    candidates_BTK: Tensor | None = None,
    entropy: bool = True,
    entropy_grad: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Score tokens under the softmax over the whole vocabulary.

        log π(o_t) = z_t[o_t] - log Σ_v exp z_t[v],   H_t = -Σ_v π_t(v) log π_t(v)

    ``BT`` stands for any leading shape. With a frozen weight and bias the backward pass needs no logits; with a trained
    one it computes them again, and the gradient of the weight is one float32 ``[V, D]``.

    Args:
        hidden_BTD: Hidden states that predict the tokens, shape ``[B, T, D]``.
        weight_VD: Rows of the unembedding, shape ``[V, D]``.
        tokens_BT: Ids of the tokens, shape ``[B, T]``.
        temperature: Sampling temperature, above 0.
        mask_BT: Positions to score, shape ``[B, T]``. The others are not computed and get 0; their ids are not read.
        bias_V: Bias of the unembedding, finite, shape ``[V]``.
        adapter: Low-rank adapter of the unembedding.
        scale: Factor on the logits, before the soft cap.
        softcap: Soft cap of the logits, above 0. None: no cap.
        candidates_BTK: More ids to score at each position, shape ``[B, T, K]``.
        entropy: Whether the entropy is wanted; without, it is 0, and a pass without gradient is a third cheaper.
        entropy_grad: Whether the entropy carries a gradient. One more matrix product with a frozen weight.
        chunk_size: Tokens per chunk. None: as many as make 64 MiB of logits.

    Returns:
        Log-probabilities and entropies in nats, each of shape ``[B, T]``; with candidates, also their
        log-probabilities, shape ``[B, T, K]``.

    Raises:
        ValueError: If shapes differ, an option is out of range, or an id to be scored is not in the vocabulary.

    >>> hidden, weight = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [2.0, 5.0]])
    >>> logprobs, entropy = full_logprobs(hidden, weight, torch.tensor([[1]]), temperature=2.0)
    >>> torch.allclose(logprobs, torch.tensor([0.0, 1.0, 1.0]).log_softmax(0)[1])
    True
    """
    form = LogitForm(temperature, scale, softcap)
    sizes = check(
        batch="BT",
        hidden_BTD=hidden_BTD,
        weight_VD=weight_VD,
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        bias_V=bias_V,
        candidates_BTK=candidates_BTK,
        **_parts(adapter),
    )
    chunk = _chunk_size(chunk_size, FULL_CHUNK_BYTES, 4 * sizes["V"])
    places = _Places(tokens_BT.shape, mask_BT)
    ids = places.take_ids("tokens_BT", tokens_BT.unsqueeze(-1), sizes["V"])
    if candidates_BTK is not None:
        ids = torch.cat([ids, places.take_ids("candidates_BTK", candidates_BTK, sizes["V"])], -1)
    learning = torch.is_grad_enabled()
    logprobs, entropies = FullHead.apply(
        *_inputs(places.take(hidden_BTD), weight_VD, bias_V, adapter),
        ids,
        form,
        chunk,
        learning,
        learning and entropy_grad,
        entropy or entropy_grad,
    )
    logprobs, entropies = places.put(logprobs), places.put(entropies)
    if candidates_BTK is None:
        return logprobs[..., 0], entropies
    return logprobs[..., 0], entropies, logprobs[..., 1:]


def full_ranks(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    tokens_BT: Tensor,
    *,
    mask_BT: Tensor | None = None,
    bias_V: Tensor | None = None,
    adapter: LowRank | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Count the ids whose logit is larger than a token's: 0 means that it is the most probable one.

    Temperature, a positive scale and a soft cap change no rank, so they are not asked for. No gradient.

    Args:
        hidden_BTD: Hidden states, shape ``[B, T, D]``; ``BT`` stands for any leading shape.
        weight_VD: Rows of the unembedding, shape ``[V, D]``.
        tokens_BT: Ids of the tokens, shape ``[B, T]``.
        mask_BT: Positions to rank, shape ``[B, T]``. The others get 0; their ids are not read.
        bias_V: Bias of the unembedding, shape ``[V]``.
        adapter: Low-rank adapter of the unembedding.
        chunk_size: Tokens per chunk. None: as many as make 64 MiB of logits.

    Returns:
        Ranks, int64, shape ``[B, T]``.

    Raises:
        ValueError: If shapes differ, or an id to be ranked is not in the vocabulary.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 5.0]])
    >>> full_ranks(hidden, weight, torch.tensor([0]))
    tensor([2])
    """
    sizes = check(
        batch="BT",
        hidden_BTD=hidden_BTD,
        weight_VD=weight_VD,
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        bias_V=bias_V,
        **_parts(adapter),
    )
    chunk = _chunk_size(chunk_size, FULL_CHUNK_BYTES, 4 * sizes["V"])
    places = _Places(tokens_BT.shape, mask_BT)
    ids = places.take_ids("tokens_BT", tokens_BT.unsqueeze(-1), sizes["V"])
    raw = RawLogits(*_inputs(places.take(hidden_BTD), weight_VD, bias_V, adapter))
    return places.put(count_larger(raw, ids, chunk))


def full_top_k(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    k: int,
    *,
    mask_BT: Tensor | None = None,
    bias_V: Tensor | None = None,
    adapter: LowRank | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Pick the k most probable ids of the whole vocabulary, by logit (highest first), then by id (lowest first).

        P_t = {v : rank(v | s_t) <= k}                        (RLPT; ties as in core-algorithms 2.4)

    Temperature, a positive scale and a soft cap change no rank, so they are not asked for. No gradient.

    Args:
        hidden_BTD: Hidden states, shape ``[B, T, D]``; ``BT`` stands for any leading shape.
        weight_VD: Rows of the unembedding, shape ``[V, D]``.
        k: Size of the set, 1 to V.
        mask_BT: Positions to look at, shape ``[B, T]``. The others get ids 0.
        bias_V: Bias of the unembedding, shape ``[V]``.
        adapter: Low-rank adapter of the unembedding.
        chunk_size: Tokens per chunk. None: as many as make 64 MiB of logits.

    Returns:
        Ids, int32, shape ``[B, T, k]``.

    Raises:
        ValueError: If shapes differ or k is out of range.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 0.0], [2.0, 5.0]])
    >>> full_top_k(hidden, weight, 2)
    tensor([[0, 2]], dtype=torch.int32)
    """
    sizes = check(
        batch="BT", hidden_BTD=hidden_BTD, weight_VD=weight_VD, mask_BT=mask_BT, bias_V=bias_V, **_parts(adapter)
    )
    if not 1 <= k <= sizes["V"]:
        raise ValueError(f"`k` must be between 1 and the vocabulary size {sizes['V']}, got {k}")
    chunk = _chunk_size(chunk_size, FULL_CHUNK_BYTES, 4 * sizes["V"])
    places = _Places(hidden_BTD.shape[:-1], mask_BT)
    raw = RawLogits(*_inputs(places.take(hidden_BTD), weight_VD, bias_V, adapter))
    return places.put(largest(raw, k, chunk))


def support_logits(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    support_BTK: Tensor,
    *,
    temperature: float = 1.0,
    mask_BT: Tensor | None = None,
    bias_V: Tensor | None = None,
    adapter: LowRank | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Compute the logits of the ids of a support, and no others.

        z_t[v]   for v in P_t                                 (RLPT; core-algorithms 2.3, the gather-matmul head [I])

    Args:
        hidden_BTD: Hidden states, shape ``[B, T, D]``; ``BT`` stands for any leading shape.
        weight_VD: Rows of the unembedding, shape ``[V, D]``.
        support_BTK: Ids of the support, shape ``[B, T, K]``.
        temperature: Sampling temperature, above 0.
        mask_BT: Positions to compute, shape ``[B, T]``. The others get 0; their ids are not read.
        bias_V: Bias of the unembedding, shape ``[V]``.
        adapter: Low-rank adapter of the unembedding.
        scale: Factor on the logits, before the soft cap.
        softcap: Soft cap of the logits, above 0. None: no cap.
        chunk_size: Tokens per chunk. None: as many as make 4 MiB of gathered rows.

    Returns:
        Logits, temperature applied, shape ``[B, T, K]``, float32 or float64.

    Raises:
        ValueError: If shapes differ, an option is out of range, or an id is not in the vocabulary.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 5.0]])
    >>> support_logits(hidden, weight, torch.tensor([[2, 1]]))
    tensor([[3., 2.]])
    """
    form = LogitForm(temperature, scale, softcap)
    sizes = check(
        batch="BT",
        hidden_BTD=hidden_BTD,
        weight_VD=weight_VD,
        support_BTK=support_BTK,
        mask_BT=mask_BT,
        bias_V=bias_V,
        **_parts(adapter),
    )
    chunk = _chunk_size(chunk_size, SUPPORT_CHUNK_BYTES, sizes["K"] * sizes["D"] * weight_VD.element_size())
    places = _Places(support_BTK.shape[:-1], mask_BT)
    ids = places.take_ids("support_BTK", support_BTK, sizes["V"])
    hidden = places.take(hidden_BTD)
    raw = RowProducts.apply(hidden, *rows_of(weight_VD, ids), chunk)
    if adapter is not None:
        raw = raw + RowProducts.apply(adapter.inner(hidden), *rows_of(adapter.up_VR, ids), chunk)
    if bias_V is not None:
        rows, places_there = rows_of(bias_V, ids)
        raw = raw + rows.to(raw.dtype)[places_there]
    return places.put(form.logits(raw))


def support_logprobs(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    tokens_BT: Tensor,
    support_BTK: Tensor,
    *,
    support_mask_BTK: Tensor | None = None,
    temperature: float = 1.0,
    mask_BT: Tensor | None = None,
    bias_V: Tensor | None = None,
    adapter: LowRank | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy_grad: bool = False,
    return_logits: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Score tokens under the softmax over a stored support.

        log π_P(o_t) = z_t[o_t] - log Σ_{v∈P_t} exp z_t[v]    (RLPT, masked policy; core-algorithms 2.2 [S])

    Args:
        hidden_BTD: Hidden states, shape ``[B, T, D]``; ``BT`` stands for any leading shape.
        weight_VD: Rows of the unembedding, shape ``[V, D]``.
        tokens_BT: Ids of the tokens, shape ``[B, T]``; each must be in its support where it is scored.
        support_BTK: Distinct ids of the support, in any order, shape ``[B, T, K]``.
        support_mask_BTK: False for slots that hold no id, shape ``[B, T, K]``. Their probability is exactly 0. None:
            all do.
        temperature: Sampling temperature, above 0.
        mask_BT: Positions to score, shape ``[B, T]``. The others get 0; their ids are not read.
        bias_V: Bias of the unembedding, shape ``[V]``.
        adapter: Low-rank adapter of the unembedding.
        scale: Factor on the logits, before the soft cap.
        softcap: Soft cap of the logits, above 0. None: no cap.
        entropy_grad: Whether the entropy carries a gradient.
        return_logits: Whether to return the logits of the support as well.
        chunk_size: Tokens per chunk. None: as many as make 4 MiB of gathered rows.

    Returns:
        Log-probabilities and entropies over the support in nats, each of shape ``[B, T]``; if asked for, also the
        logits, temperature applied, with gradient, shape ``[B, T, K]``, 0 in slots that hold no id.

    Raises:
        ValueError: If shapes differ, an option is out of range, or a token to be scored is not in its support.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [2.0, 5.0]])
    >>> logprobs, entropy = support_logprobs(hidden, weight, torch.tensor([1]), torch.tensor([[2, 1]]))
    >>> logprobs.exp(), entropy.exp()
    (tensor([0.5000]), tensor([2.]))
    """
    check(
        batch="BT",
        hidden_BTD=hidden_BTD,
        tokens_BT=tokens_BT,
        support_BTK=support_BTK,
        support_mask_BTK=support_mask_BTK,
        mask_BT=mask_BT,
    )
    places = _Places(tokens_BT.shape, mask_BT)
    support = places.take(support_BTK)
    slots = torch.ones_like(support, dtype=torch.bool) if support_mask_BTK is None else places.take(support_mask_BTK)
    hits = (support == places.take(tokens_BT.unsqueeze(-1))) & slots
    if not torch.compiler.is_compiling():
        _refuse_tokens_outside(hits)
    logits = support_logits(
        places.take(hidden_BTD),
        weight_VD,
        support.masked_fill(~slots, 0),
        temperature=temperature,
        bias_V=bias_V,
        adapter=adapter,
        scale=scale,
        softcap=softcap,
        chunk_size=chunk_size,
    )
    logprobs = logits.masked_fill(~slots, -torch.inf).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(~slots, 0)).sum(-1)
    chosen = logprobs.gather(-1, hits.int().argmax(-1, keepdim=True)).squeeze(-1)
    results = [chosen, entropy if entropy_grad else entropy.detach()]
    if return_logits:
        results.append(logits.masked_fill(~slots, 0))
    return tuple(places.put(result) for result in results)


def _refuse_tokens_outside(hits: Tensor) -> None:
    """Refuse tokens, one per row of slots, that no slot of their support holds."""
    outside = int((~hits.any(-1)).sum())
    if outside:
        raise ValueError(
            f"`tokens_BT` must be in `support_BTK` where they are scored, got {outside} of {len(hits)} tokens outside; "
            "was the support stored by the sampler that drew them?"
        )


class _Places:
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

    def take(self, values: Tensor) -> Tensor:
        """Return the values of the positions to compute, [N, ...]."""
        flat = values.reshape(-1, *values.shape[len(self.lead) :])
        if self.hidden is not None:
            return self._clear(flat)
        return flat if self.index is None else flat.index_select(0, self.index)

    def take_ids(self, name: str, values: Tensor, vocabulary: int) -> Tensor:
        """Return ids as int64 after a check that they are in the vocabulary."""
        ids = self.take(values).long()
        if ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= vocabulary:
                raise ValueError(f"`{name}` must be in [0, {vocabulary}) wherever it is scored, got [{low}, {high}]")
        return ids

    def put(self, values: Tensor) -> Tensor:
        """Return values to their places in the leading shape."""
        if self.hidden is not None:
            values = self._clear(values)
        elif self.index is not None:
            values = values.new_zeros(self.lead.numel(), *values.shape[1:]).index_copy(0, self.index, values)
        return values.reshape(*self.lead, *values.shape[1:])

    def _clear(self, values: Tensor) -> Tensor:
        """Return [all positions, ...] with 0 at the masked ones; a NaN there reaches no value and no gradient."""
        assert self.hidden is not None
        return values.masked_fill(self.hidden.view(-1, *(1 for _ in values.shape[1:])), 0)


def _parts(adapter: LowRank | None) -> dict[str, Any]:
    """Return the tensors of an adapter by name, for a check of their shapes."""
    return {} if adapter is None else {"down_RD": adapter.down_RD, "up_VR": adapter.up_VR}


def _inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: LowRank | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return what raw logits are made of: hidden states, weight, bias, and an adapter's u and B."""
    inner, up = (None, None) if adapter is None else (adapter.inner(hidden), whole(adapter.up_VR))
    return hidden, whole(weight), whole(bias), inner, up


def _chunk_size(chunk_size: int | None, budget: int, bytes_per_token: int) -> int:
    if chunk_size is None:
        return max(1, budget // max(1, bytes_per_token))
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    return chunk_size
