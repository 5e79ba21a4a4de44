"""From logits to promising sets: the few tokens on which the policy is defined and trained.

RLPT (arXiv:2602.03195): P_t = {v : rank(v | s_t) <= K}, taken from the policy at rollout time,
stored, and never recomputed [S, I] (docs/algorithms.md 2.2).
"""

import math

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Pick exactly k tokens per row, by value (highest first), then by id (lowest first).

        P = {v : rank(v) <= k}   (RLPT [S]; ties [I]; docs/algorithms.md 2.2)

    Equal logits are common in bfloat16, and ``torch.topk`` breaks such ties arbitrarily.

    Args:
        logits_BV: Logits or log-probabilities without NaN, shape ``[B, V]``.
        k: Size of the set, 1 to V.

    Returns:
        Ids, shape ``[B, k]``, int32.

    Raises:
        ValueError: If k is out of range.

    >>> top_k(torch.tensor([[1.0, 3.0, 3.0, 1.0]]), 3).tolist()
    [[1, 2, 0]]
    """
    vocabulary = check(logits_BV=logits_BV)["V"]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"`k` must be between 1 and the vocabulary size {vocabulary}, got {k}")
    values, ids = logits_BV.topk(min(k + 1, vocabulary), dim=-1)
    tied = (values[:, 1:] == values[:, :-1]).any(-1).nonzero().squeeze(-1)
    support = ids[:, :k]
    if len(tied):
        support = support.index_copy(
            0, tied, _top_k_with_ties(logits_BV[tied], values[tied, k - 1 : k], k)
        )
    return support.to(torch.int32)


def nucleus(logits_BV: Tensor, p: float, max_k: int) -> tuple[Tensor, Tensor]:
    """Pick the smallest set of most likely tokens with mass p, at most max_k of them.

        P = {v : Σ_{u ranked before v} π(u) < p and rank(v) <= max_k}  (bound as in prime-rl [S];
        docs/algorithms.md 2.3)

    Args:
        logits_BV: Logits, temperature applied, shape ``[B, V]``.
        p: Probability mass to keep, in (0, 1]; 1 keeps max_k tokens.
        max_k: Number of slots, 1 to V.

    Returns:
        Ids, shape ``[B, max_k]``, int32, and the slots that are in the set, shape ``[B, max_k]``,
        bool; the first is always in.

    Raises:
        ValueError: If p or max_k is out of range.

    >>> support, mask = nucleus(torch.tensor([[0.1, 0.6, 0.3]]).log(), 0.8, 3)
    >>> support.tolist(), mask.tolist()
    ([[1, 2, 0]], [[True, True, False]])
    """
    vocabulary = check(logits_BV=logits_BV)["V"]
    if not 0 < p <= 1:
        raise ValueError(f"`p` must be in (0, 1], got {p}")
    if not 1 <= max_k <= vocabulary:
        raise ValueError(
            f"`max_k` must be between 1 and the vocabulary size {vocabulary}, got {max_k}"
        )
    support = top_k(logits_BV, max_k)
    logits = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    probabilities = (logits.gather(-1, support.long()) - logits.logsumexp(-1, keepdim=True)).exp()
    before = probabilities.cumsum(-1) - probabilities
    return support, ((before < p) | (p == 1)) & (probabilities > 0)


def min_p(logits_BV: Tensor, ratio: float, max_k: int) -> tuple[Tensor, Tensor]:
    """Pick the tokens that are not much less likely than the most likely one, at most max_k of
    them.

        P = {v : π(v) >= ratio · max_u π(u) and rank(v) <= max_k}
                                                                 (min-p [S]; docs/algorithms.md 2.3)

    Args:
        logits_BV: Logits, temperature applied, shape ``[B, V]``.
        ratio: In (0, 1]; 1 keeps ties of the most likely token.
        max_k: Number of slots, 1 to V.

    Returns:
        Ids, shape ``[B, max_k]``, int32, and the slots that are in the set, shape ``[B, max_k]``,
        bool; the first is always in.

    Raises:
        ValueError: If ratio or max_k is out of range.

    >>> support, mask = min_p(torch.tensor([[0.1, 0.6, 0.3]]).log(), 0.4, 3)
    >>> support.tolist(), mask.tolist()
    ([[1, 2, 0]], [[True, True, False]])
    """
    vocabulary = check(logits_BV=logits_BV)["V"]
    if not 0 < ratio <= 1:
        raise ValueError(f"`ratio` must be in (0, 1], got {ratio}")
    if not 1 <= max_k <= vocabulary:
        raise ValueError(
            f"`max_k` must be between 1 and the vocabulary size {vocabulary}, got {max_k}"
        )
    support = top_k(logits_BV, max_k)
    chosen = logits_BV.gather(-1, support.long())
    return support, (chosen - chosen[:, :1]) >= math.log(ratio)


def outside(
    tokens_BT: Tensor, support_BTK: Tensor, support_mask_BTK: Tensor | None, mask_BT: Tensor
) -> Tensor:
    """Mark the sampled tokens that their stored support lacks.

    Args:
        tokens_BT: Ids of the sampled tokens, shape ``[B, T]``.
        support_BTK: Ids of the supports, shape ``[B, T, K]``.
        support_mask_BTK: False for slots that hold no id, shape ``[B, T, K]``. None: all hold one.
        mask_BT: Which tokens were sampled, bool, shape ``[B, T]``.

    Returns:
        Bool, shape ``[B, T]``.

    Raises:
        ValueError: If the shapes differ.

    >>> mask, support = torch.tensor([[True, True]]), torch.tensor([[[5, 6], [5, 6]]])
    >>> outside(torch.tensor([[5, 7]]), support, None, mask)
    tensor([[False,  True]])
    """
    check(
        tokens_BT=tokens_BT,
        support_BTK=support_BTK,
        support_mask_BTK=support_mask_BTK,
        mask_BT=mask_BT,
    )
    hits_BTK = support_BTK == tokens_BT.unsqueeze(-1)
    if support_mask_BTK is not None:
        hits_BTK = hits_BTK & support_mask_BTK
    return mask_BT & ~hits_BTK.any(-1)


def unite(
    tokens_BT: Tensor, support_BTK: Tensor, support_mask_BTK: Tensor | None, outside_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Add a slot to every support, which holds the sampled token where the support lacks it and
    nothing elsewhere.

        P'_t = P_t ∪ {o_t}                                    ([I]; docs/algorithms.md 2.4)

    Args:
        tokens_BT: Ids of the sampled tokens, shape ``[B, T]``.
        support_BTK: Ids of the supports, shape ``[B, T, K]``.
        support_mask_BTK: False for slots that hold no id, shape ``[B, T, K]``. None: all hold one.
        outside_BT: From :func:`outside`, shape ``[B, T]``.

    Returns:
        Ids and slots, each of shape ``[B, T, K + 1]``.

    Raises:
        ValueError: If the shapes differ.

    >>> outside, support = torch.tensor([[True]]), torch.tensor([[[5, 6]]])
    >>> support, slots = unite(torch.tensor([[7]]), support, None, outside)
    >>> support.tolist(), slots.tolist()
    ([[[5, 6, 7]]], [[[True, True, True]]])
    """
    check(
        tokens_BT=tokens_BT,
        support_BTK=support_BTK,
        support_mask_BTK=support_mask_BTK,
        outside_mask_BT=outside_BT,
    )
    support_mask_BTK = (
        torch.ones_like(support_BTK, dtype=torch.bool)
        if support_mask_BTK is None
        else support_mask_BTK
    )
    more = torch.where(outside_BT, tokens_BT, 0).to(support_BTK.dtype).unsqueeze(-1)
    return torch.cat([support_BTK, more], -1), torch.cat(
        [support_mask_BTK, outside_BT.unsqueeze(-1)], -1
    )


def candidates(
    logits_BV: Tensor, tokens_B: Tensor, k: int, support_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pick the k most probable ids of one step, and the sampled one if it is not among them.

        A' = TopK(μ, k) ∪ {o}   (DPPO top-K [P]; docs/algorithms.md 5.6 and 2.2)

    Stable-RL puts the sampled token in the place of the k-th id instead [C].

    Args:
        logits_BV: Logits of what was sampled from, shape ``[B, V]``; -inf where nothing can be
            drawn.
        tokens_B: Sampled tokens, shape ``[B]``: columns of the logits.
        k: How many, at least 1.
        support_BV: Ids of the columns, distinct where the logits are finite, shape ``[B, V]``.
            None: the column is the id.

    Returns:
        Ids, int32, and their logits, each of shape ``[B, k + 1]``; the last slot is the sampled
        token's, if it needs one. Slots that are not used hold id 0 and -inf.

    Raises:
        ValueError: If shapes differ or k is out of range.

    >>> logits = torch.tensor([[0.0, 3.0, 2.0], [0.0, 3.0, 2.0]])
    >>> ids, logits = candidates(logits, torch.tensor([0, 1]), 2)
    >>> ids.tolist(), logits.tolist()
    ([[1, 2, 0], [1, 2, 0]], [[3.0, 2.0, 0.0], [3.0, 2.0, -inf]])
    """
    columns = check(logits_BV=logits_BV, tokens_B=tokens_B, support_BV=support_BV)["V"]
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}")
    column = tokens_B.long().unsqueeze(-1)
    token_logits = logits_BV.gather(-1, column)
    # the k best ids
    if support_BV is None:
        ids = best = top_k(logits_BV, min(k, columns)).long()
        logits, token = logits_BV.gather(-1, best), column
    else:
        order = support_BV.argsort(-1)  # of equal values the lowest id is to come first
        best = order.gather(-1, top_k(logits_BV.gather(-1, order), min(k, columns)).long())
        logits, ids = logits_BV.gather(-1, best), support_BV.gather(-1, best)
        token = support_BV.gather(-1, column)
    # K slots, and one for the sampled token if it is not among them
    logits = torch.nn.functional.pad(logits, (0, k - best.shape[1]), value=-torch.inf)
    ids = torch.nn.functional.pad(ids, (0, k - best.shape[1]))
    held = (best == column).any(-1, keepdim=True)
    ids, logits = (
        torch.cat([ids, token], -1),
        torch.cat([logits, token_logits.masked_fill(held, -torch.inf)], -1),
    )
    return ids.masked_fill(logits == -torch.inf, 0).to(torch.int32), logits


def logprobs_at(
    candidates_BTK: Tensor,
    support_BTJ: Tensor,
    logits_BTJ: Tensor,
    support_mask_BTJ: Tensor | None = None,
) -> Tensor:
    """Look ids up among the log-probabilities over a support.

        log π_P(c) = z[c] - log Σ_{v∈P} exp z[v]   for c in P,   -inf elsewhere
                                                                            (docs/algorithms.md 5.6)

    Args:
        candidates_BTK: Ids to look up, shape ``[B, T, K]``; ``BT`` stands for any leading shape.
        support_BTJ: Distinct ids of the support, shape ``[B, T, J]``.
        logits_BTJ: Their logits, temperature applied, shape ``[B, T, J]``.
        support_mask_BTJ: False for slots that hold no id, shape ``[B, T, J]``. None: all hold one.

    Returns:
        Log-probabilities in nats, shape ``[B, T, K]``.

    Raises:
        ValueError: If the shapes differ.

    >>> support, logits = torch.tensor([[5, 7]]), torch.tensor([[0.0, 0.0]])
    >>> logprobs_at(torch.tensor([[7, 9]]), support, logits).exp()
    tensor([[0.5000, 0.0000]])
    """
    check(
        batch="BT",
        candidates_BTK=candidates_BTK,
        support_BTJ=support_BTJ,
        logits_BTJ=logits_BTJ,
        support_mask_BTJ=support_mask_BTJ,
    )
    hits = candidates_BTK.unsqueeze(-1) == support_BTJ.unsqueeze(-2)
    if support_mask_BTJ is not None:
        hits = hits & support_mask_BTJ.unsqueeze(-2)
        logits_BTJ = logits_BTJ.masked_fill(~support_mask_BTJ, -torch.inf)
    logprobs = logits_BTJ.log_softmax(-1).gather(-1, hits.int().argmax(-1))
    return logprobs.masked_fill(~hits.any(-1), -torch.inf)


def _top_k_with_ties(logits: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Take all above the threshold, then the lowest ids at it; a stable sort keeps ids ascending
    among equals.
    """
    above, level = logits > threshold, logits == threshold
    missing = k - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1) <= missing))
    ids = chosen.nonzero()[:, 1].view(-1, k)
    return ids.gather(-1, logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices)
