"""From hidden states to log-probabilities and entropies, without ever holding a ``[B, T, V]`` tensor.

The full head takes the softmax over the vocabulary, a chunk of tokens at a time. The support head takes it over the few
ids that were stored at rollout time (RLPT, Reinforcement Learning with Promising Tokens, arXiv:2602.03195), and touches
only those rows of the weight, so that its cost does not grow with V. Both describe the same logits
(docs/algorithms.md 2.1),

    z = cap(scale · (h W + b)) / temperature,   cap(x) = softcap · tanh(x / softcap)     (Gemma 2, arXiv:2408.00118)

(with a low-rank adapter, W + s · B A stands for W), and both have a hand-written gradient (``head_gradients.py``). Matrix
products run in the narrower dtype of hidden state and weight, also under autocast; everything after them in float32
(float64 if both are float64). Of a weight that is sharded over processes (FSDP2) the support head fetches the rows it
needs, the full head the whole matrix.

``torch.compile(..., fullgraph=True)`` takes the support functions, with backward. What differs: checks that read values
(ids in the vocabulary, tokens in their support) are left out, and masked positions are computed from zeros instead of
being skipped. The loop over chunks is unrolled, so give a large ``chunk_size``. The full head is not meant to be
compiled: its time is in one matrix product.
"""

import torch
from torch import Tensor

from lightning_mpo.functional.head_gradients import FullHead, LogitForm, RowProducts
from lightning_mpo.functional.head_positions import (
    FULL_CHUNK_BYTES,
    SUPPORT_CHUNK_BYTES,
    Positions,
    adapter_parts,
    raw_inputs,
    tokens_per_chunk,
)
from lightning_mpo.functional.low_rank import LowRank
from lightning_mpo.functional.shapes import check
from lightning_mpo.functional.sharded_rows import rows_of


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
    candidates_grad: bool = True,
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
        candidates_grad: Whether they carry a gradient; without, a backward pass does not read their rows.
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
        **adapter_parts(adapter),
    )
    chunk = tokens_per_chunk(chunk_size, FULL_CHUNK_BYTES, 4 * sizes["V"])
    positions = Positions(tokens_BT.shape, mask_BT)
    ids = positions.gather_ids("tokens_BT", tokens_BT.unsqueeze(-1), sizes["V"])
    if candidates_BTK is not None:
        ids = torch.cat(
            [ids, positions.gather_ids("candidates_BTK", candidates_BTK, sizes["V"])], -1
        )
    learning, learnt = torch.is_grad_enabled(), ids.shape[1] if candidates_grad else 1
    logprobs, entropies = FullHead.apply(
        *raw_inputs(positions.gather(hidden_BTD), weight_VD, bias_V, adapter),
        ids,
        form,
        chunk,
        learning,
        learning and entropy_grad,
        entropy or entropy_grad,
        learnt,
    )
    logprobs, entropies = positions.scatter(logprobs), positions.scatter(entropies)
    if candidates_BTK is None:
        return logprobs[..., 0], entropies
    candidates = logprobs[..., 1:]
    return logprobs[..., 0], entropies, candidates if candidates_grad else candidates.detach()


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

        z_t[v]   for v in P_t                                 (RLPT; the gather-matmul head [I]; docs/algorithms.md 2.1)

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
        **adapter_parts(adapter),
    )
    chunk = tokens_per_chunk(
        chunk_size, SUPPORT_CHUNK_BYTES, sizes["K"] * sizes["D"] * weight_VD.element_size()
    )
    positions = Positions(support_BTK.shape[:-1], mask_BT)
    ids = positions.gather_ids("support_BTK", support_BTK, sizes["V"])
    hidden = positions.gather(hidden_BTD)
    raw = RowProducts.apply(hidden, *rows_of(weight_VD, ids), chunk)
    if adapter is not None:
        raw = raw + RowProducts.apply(adapter.inner(hidden), *rows_of(adapter.up_VR, ids), chunk)
    if bias_V is not None:
        rows, places_there = rows_of(bias_V, ids)
        raw = raw + rows.to(raw.dtype)[places_there]
    return positions.scatter(form.logits(raw))


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

        log π_P(o_t) = z_t[o_t] - log Σ_{v∈P_t} exp z_t[v]    (RLPT, masked policy [S]; docs/algorithms.md 2.2)

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
    positions = Positions(tokens_BT.shape, mask_BT)
    support = positions.gather(support_BTK)
    slots = (
        torch.ones_like(support, dtype=torch.bool)
        if support_mask_BTK is None
        else positions.gather(support_mask_BTK)
    )
    hits = (support == positions.gather(tokens_BT.unsqueeze(-1))) & slots
    if not torch.compiler.is_compiling():
        _refuse_tokens_outside(hits)
    logits = support_logits(
        positions.gather(hidden_BTD),
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
    return tuple(positions.scatter(result) for result in results)


def _refuse_tokens_outside(hits: Tensor) -> None:
    """Refuse tokens, one per row of slots, that no slot of their support holds."""
    outside = int((~hits.any(-1)).sum())
    if outside:
        raise ValueError(
            f"`tokens_BT` must be in `support_BTK` where they are scored, got {outside} of {len(hits)} tokens outside; "
            "was the support stored by the sampler that drew them?"
        )
