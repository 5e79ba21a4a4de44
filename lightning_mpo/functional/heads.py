"""From hidden states to log-probabilities and entropies, without a ``[B, T, V]`` tensor.

The full head takes the softmax over the vocabulary, a chunk of tokens at a time. The support head
takes it over the few ids that were stored at rollout time (RLPT, Reinforcement Learning with
Promising Tokens, arXiv:2602.03195). It touches only those rows of the weight, so its cost does not
grow with V. Both describe the same logits (docs/algorithms.md 2.1),

    z = cap(scale · (h Wᵀ + b)) / temperature,   cap(x) = softcap · tanh(x / softcap)

(soft cap: Gemma 2, arXiv:2408.00118; with a low-rank adapter, W + s · B A stands for W). Ids that
the head bars have z = -inf: both take the softmax over the others (docs/algorithms.md 2.6). Both have
a hand-written gradient (``head_gradients.py``). Matrix products run in the narrower dtype of hidden
state and weight, also under autocast. Everything after them is float32, or float64 if both are
float64. Of a weight that is sharded over processes (FSDP2) the support head fetches the rows it
needs, the full head the whole matrix.

``torch.compile(..., fullgraph=True)`` takes the support functions, with backward. Compiled, they
leave out checks that read values (ids in the vocabulary, tokens in their support), and compute
masked positions from zeros instead of skipping them. The loop over chunks is unrolled, so give a
large ``chunk_size``. The full head is not meant to be compiled: its time is in one matrix product.
"""

import torch
from torch import Tensor

from lightning_mpo.functional.head_gradients import FullHead, RowProducts, Scan
from lightning_mpo.functional.head_logits import Head
from lightning_mpo.functional.head_positions import Positions
from lightning_mpo.functional.shapes import check
from lightning_mpo.functional.sharded_rows import rows_of

FULL_CHUNK_BYTES = 64 * 2**20
"""Default size of one chunk of float32 logits."""
SUPPORT_CHUNK_BYTES = 4 * 2**20
"""Default size of one chunk of gathered weight rows."""


def full_logprobs(
    hidden_BTD: Tensor,
    head: Head,
    tokens_BT: Tensor,
    *,
    mask_BT: Tensor | None = None,
    candidates_BTK: Tensor | None = None,
    candidates_grad: bool = True,
    entropy: bool = True,
    entropy_grad: bool = False,
) -> tuple[Tensor, ...]:
    """Score tokens under the softmax over the whole vocabulary.

        log π(o_t) = z_t[o_t] - log Σ_v exp z_t[v],   H_t = -Σ_v π_t(v) log π_t(v)

    ``BT`` stands for any leading shape. With a frozen weight and bias the backward pass needs no
    logits. With a trained one it computes them again; the weight's gradient is one float32 ``[V,
    D]``.

    Args:
        hidden_BTD: Hidden states that predict the tokens, shape ``[B, T, D]``.
        head: The unembedding, and the form of its logits.
        tokens_BT: Ids of the tokens, shape ``[B, T]``.
        mask_BT: Positions to score, shape ``[B, T]``. The others get 0; their ids are not read.
        candidates_BTK: More ids to score at each position, shape ``[B, T, K]``.
        candidates_grad: Give them a gradient. Without, a backward pass does not read their rows.
        entropy: Compute the entropy. Without, it is 0; a pass without gradient is a third cheaper.
        entropy_grad: Give it a gradient. One more matrix product with a frozen weight.

    Returns:
        Log-probabilities and entropies in nats, each of shape ``[B, T]``. With candidates, also
        their log-probabilities, shape ``[B, T, K]``. Those of barred ids are -inf, without gradient.

    Raises:
        ValueError: If shapes differ, or an id to be scored is not in the vocabulary.

    >>> hidden, tokens = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[1]])
    >>> head = Head(torch.tensor([[0.0, 1.0], [2.0, 0.0], [2.0, 5.0]]), temperature=2.0)
    >>> logprobs, entropy = full_logprobs(hidden, head, tokens)
    >>> torch.allclose(logprobs, torch.tensor([0.0, 1.0, 1.0]).log_softmax(0)[1])
    True
    """
    # the positions and ids to score: the token first, candidates behind it
    V = head.check(hidden_BTD, tokens_BT=tokens_BT, mask_BT=mask_BT, candidates_BTK=candidates_BTK)[
        "V"
    ]
    positions = Positions(tokens_BT.shape, mask_BT)
    ids = positions.gather_ids("tokens_BT", tokens_BT.unsqueeze(-1), V)
    if candidates_BTK is not None:
        ids = torch.cat([ids, positions.gather_ids("candidates_BTK", candidates_BTK, V)], -1)
    # one scan over the tokens, in chunks
    scan = _scan(head, V, entropy, entropy_grad, ids.shape[1] if candidates_grad else 1)
    inputs = head.raw_inputs(positions.gather(hidden_BTD))
    logprobs, entropies = FullHead.apply(*inputs, ids, scan)
    # results, in the leading shape
    logprobs, entropies = positions.scatter(logprobs), positions.scatter(entropies)
    if candidates_BTK is None:
        return logprobs[..., 0], entropies
    candidates = logprobs[..., 1:]
    return logprobs[..., 0], entropies, candidates if candidates_grad else candidates.detach()


def _scan(head: Head, V: int, entropy: bool, entropy_grad: bool, learnt_ids: int) -> Scan:
    """Return the options of a scan; without autograd nothing is kept for gradients."""
    learning = torch.is_grad_enabled()
    return Scan(
        head.form,
        chunk=head.tokens_per_chunk(FULL_CHUNK_BYTES, 4 * V),
        learning=learning,
        entropy=entropy or entropy_grad,
        entropy_grad=learning and entropy_grad,
        learnt_ids=learnt_ids,
        barred=head.barred_V,
    )


def support_logits(
    hidden_BTD: Tensor, head: Head, support_BTK: Tensor, *, mask_BT: Tensor | None = None
) -> Tensor:
    """Compute the logits of the ids of a support, and no others; barred ids are not left out.

        z_t[v]   for v in P_t           (RLPT; the gather-matmul head [I]; docs/algorithms.md 2.1)

    Args:
        hidden_BTD: Hidden states, shape ``[B, T, D]``; ``BT`` stands for any leading shape.
        head: The unembedding, and the form of its logits.
        support_BTK: Ids of the support, shape ``[B, T, K]``.
        mask_BT: Positions to compute, shape ``[B, T]``. The others get 0; their ids are not read.

    Returns:
        Logits, temperature applied, shape ``[B, T, K]``, float32 or float64.

    Raises:
        ValueError: If shapes differ, or an id is not in the vocabulary.

    >>> hidden = torch.tensor([[1.0, 0.0]])
    >>> head = Head(torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 5.0]]))
    >>> support_logits(hidden, head, torch.tensor([[2, 1]]))
    tensor([[3., 2.]])
    """
    sizes = head.check(hidden_BTD, support_BTK=support_BTK, mask_BT=mask_BT)
    row_bytes = sizes["D"] * head.weight_VD.element_size()
    chunk = head.tokens_per_chunk(SUPPORT_CHUNK_BYTES, sizes["K"] * row_bytes)
    positions = Positions(support_BTK.shape[:-1], mask_BT)
    ids = positions.gather_ids("support_BTK", support_BTK, sizes["V"])
    hidden = positions.gather(hidden_BTD)
    # raw products with the rows of the weight, of the adapter and of the bias
    raw = RowProducts.apply(hidden, *rows_of(head.weight_VD, ids), chunk)
    if head.adapter is not None:
        inner, up_VR = head.adapter.inner(hidden), head.adapter.up_VR
        raw = raw + RowProducts.apply(inner, *rows_of(up_VR, ids), chunk)
    if head.bias_V is not None:
        rows, row_of_id = rows_of(head.bias_V, ids)
        raw = raw + rows.to(raw.dtype)[row_of_id]
    return positions.scatter(head.form.logits(raw))


def support_logprobs(
    hidden_BTD: Tensor,
    head: Head,
    tokens_BT: Tensor,
    support_BTK: Tensor,
    *,
    support_mask_BTK: Tensor | None = None,
    mask_BT: Tensor | None = None,
    entropy_grad: bool = False,
    return_logits: bool = False,
) -> tuple[Tensor, ...]:
    """Score tokens under the softmax over a stored support.

        log π_P(o_t) = z_t[o_t] - log Σ_{v∈P_t} exp z_t[v]    (RLPT [S]; docs/algorithms.md 2.2)

    Args:
        hidden_BTD: Hidden states, shape ``[B, T, D]``; ``BT`` stands for any leading shape.
        head: The unembedding, and the form of its logits.
        tokens_BT: Ids of the tokens, shape ``[B, T]``; each must be in its support where it is
            scored.
        support_BTK: Distinct ids of the support, in any order, shape ``[B, T, K]``.
        support_mask_BTK: False for slots that hold no id and get probability 0. None: all hold one.
        mask_BT: Positions to score, shape ``[B, T]``. The others get 0; their ids are not read.
        entropy_grad: Give the entropy a gradient.
        return_logits: Return the logits, too, with gradient, ``[B, T, K]``, 0 in slots without id.

    Returns:
        Log-probabilities and entropies over the support in nats, each ``[B, T]``, and the logits.

    Raises:
        ValueError: If shapes differ, or a token to be scored is not in its support.

    >>> hidden = torch.tensor([[1.0, 0.0]])
    >>> head = Head(torch.tensor([[0.0, 1.0], [2.0, 0.0], [2.0, 5.0]]))
    >>> scores = support_logprobs(hidden, head, torch.tensor([1]), torch.tensor([[2, 1]]))
    >>> scores[0].exp(), scores[1].exp()
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
    # the slots that hold an id, and the slot of each token
    positions = Positions(tokens_BT.shape, mask_BT)
    support, slots = _gather_slots(positions, support_BTK, support_mask_BTK, head.barred_V)
    slot_of_token = _find(positions.gather(tokens_BT.unsqueeze(-1)), support, slots)
    # the softmax over the support
    logits = support_logits(positions.gather(hidden_BTD), head, support.masked_fill(~slots, 0))
    logprobs = logits.masked_fill(~slots, -torch.inf).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(~slots, 0)).sum(-1)
    chosen = logprobs.gather(-1, slot_of_token).squeeze(-1)
    # results, in the leading shape
    results = [chosen, entropy if entropy_grad else entropy.detach()]
    if return_logits:
        results.append(logits.masked_fill(~slots, 0))
    return tuple(positions.scatter(result) for result in results)


def _gather_slots(
    positions: Positions,
    support_BTK: Tensor,
    support_mask_BTK: Tensor | None,
    barred_V: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return ids and mask of the slots at the positions to score, each ``[N, K]``.

    The mask is False for slots without id, and for barred ids.
    """
    support = positions.gather(support_BTK)
    slots = torch.ones_like(support, dtype=torch.bool)
    if support_mask_BTK is not None:
        slots = positions.gather(support_mask_BTK)
    if barred_V is not None:
        slots = slots & ~barred_V[support.masked_fill(~slots, 0).long()]
    return support, slots


def _find(tokens: Tensor, support: Tensor, slots: Tensor) -> Tensor:
    """Return the slot that holds each token, ``[N, 1]``.

    Raises:
        ValueError: If no slot of its support holds a token; not checked under `torch.compile`.
    """
    hits = (support == tokens) & slots
    if not torch.compiler.is_compiling():
        outside = int((~hits.any(-1)).sum())
        if outside:
            raise ValueError(
                "`tokens_BT` must be in `support_BTK` where they are scored, got "
                f"{outside} of {len(hits)} tokens outside; "
                "was the support stored by the sampler that drew them?"
            )
    return hits.int().argmax(-1, keepdim=True)
