"""Numbers that say how well the stored supports fit the policy (docs/algorithms.md 2.5). None
carries a gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, same


@torch.no_grad()
def kept_mass(logprobs: Tensor, support_logprobs: Tensor) -> Tensor:
    """Compute the probability that the full policy gives to a support, from one token's two
    log-probabilities.

        Z = Σ_{v∈P} π(v) = exp(log π(o) - log π_P(o))   ([V]; docs/algorithms.md 16.2, invariant 7)

    A ratio that equals Z on policy is the classic bug: a full-vocabulary numerator over a truncated
    denominator.

    Args:
        logprobs: Log-probabilities under the full softmax, any shape, nats.
        support_logprobs: Log-probabilities of the same tokens under the softmax over the support,
            same shape.

    Returns:
        Probabilities, same shape.

    Raises:
        ValueError: If the shapes differ.

    >>> kept_mass(torch.tensor([0.2]).log(), torch.tensor([0.25]).log())
    tensor([0.8000])
    """
    same(logprobs=logprobs, support_logprobs=support_logprobs)
    return (logprobs - support_logprobs).exp()


@torch.no_grad()
def support_overlap(
    support_BTK: Tensor, candidates_BTK: Tensor, support_mask_BTK: Tensor | None = None
) -> Tensor:
    """Measure how much of a stored support would still be chosen: its overlap with the best tokens
    of today's policy.

        |top-n(π_θ) ∩ P| / n,   n = |P|                       (docs/algorithms.md 2.5)

    Args:
        support_BTK: Ids of the supports, shape ``[B, T, K]``.
        candidates_BTK: The K most probable ids of today, best first, shape ``[B, T, K]``.
        support_mask_BTK: False for slots that hold no id, shape ``[B, T, K]``. None: all hold one.

    Returns:
        Shares in [0, 1], shape ``[B, T]``; 0 where a support holds no id.

    Raises:
        ValueError: If the shapes differ.

    >>> support_overlap(torch.tensor([[[5, 6, 7, 8]]]), torch.tensor([[[5, 9, 8, 7]]]))
    tensor([[0.7500]])
    """
    check(support_BTK=support_BTK, candidates_BTK=candidates_BTK, support_mask_BTK=support_mask_BTK)
    support_mask_BTK = (
        torch.ones_like(support_BTK, dtype=torch.bool)
        if support_mask_BTK is None
        else support_mask_BTK
    )
    size_BT = support_mask_BTK.sum(-1)
    today_BTK = torch.arange(
        candidates_BTK.shape[-1], device=candidates_BTK.device
    ) < size_BT.unsqueeze(-1)
    same = (
        (support_BTK.unsqueeze(-1) == candidates_BTK.unsqueeze(-2))
        & support_mask_BTK.unsqueeze(-1)
        & today_BTK.unsqueeze(-2)
    )
    return same.any(-2).sum(-1) / size_BT.clamp(min=1)


@torch.no_grad()
def could_not_stop(
    support_BTK: Tensor,
    support_mask_BTK: Tensor | None,
    mask_BT: Tensor,
    ended_B: Tensor,
    ends: Sequence[int],
) -> Tensor:
    """Mark the responses that ran into the length limit and had an end token in none of their
    supports.

    Outside a support a token has probability 0: such a response could not have stopped
    (docs/algorithms.md 2.5).

    Args:
        support_BTK: Ids of the supports, shape ``[B, T, K]``.
        support_mask_BTK: False for slots that hold no id, shape ``[B, T, K]``. None: all hold one.
        mask_BT: Which tokens were sampled, bool, shape ``[B, T]``.
        ended_B: Which responses ended by an end token, bool, shape ``[B]``.
        ends: Ids that end a response.

    Returns:
        Bool, shape ``[B]``.

    Raises:
        ValueError: If the shapes differ.

    >>> support = torch.tensor([[[5, 6], [5, 2]], [[5, 6], [5, 7]]])
    >>> could_not_stop(support, None, torch.ones(2, 2).bool(), torch.tensor([False, False]), [2])
    tensor([False,  True])
    """
    check(
        support_BTK=support_BTK,
        support_mask_BTK=support_mask_BTK,
        mask_BT=mask_BT,
        ended_mask_B=ended_B,
    )
    possible_BTK = torch.isin(
        support_BTK, torch.tensor(list(ends), dtype=support_BTK.dtype, device=support_BTK.device)
    )
    if support_mask_BTK is not None:
        possible_BTK = possible_BTK & support_mask_BTK
    return ~ended_B & ~(possible_BTK.any(-1) & mask_BT).any(-1)


@torch.no_grad()
def score_variance(logits_BTK: Tensor, support_mask_BTK: Tensor | None = None) -> Tensor:
    """Compute the variance of the score, the gradient of a sampled token's log-probability with
    respect to the logits.

        tr Cov(e_o - π_P) = 1 - Σ_{v∈P} π_P(v)²
                                          ([I, V], not the authors' theorem; docs/algorithms.md 2.5)

    On a top-K set it is never above that of the full softmax.

    Args:
        logits_BTK: Logits on the support, temperature applied, shape ``[B, T, K]``.
        support_mask_BTK: False for slots that are not in the support, shape ``[B, T, K]``. None:
            all are.

    Returns:
        Variances in [0, 1), shape ``[B, T]``.

    Raises:
        ValueError: If the shapes differ.

    >>> score_variance(torch.zeros(1, 1, 4))
    tensor([[0.7500]])
    """
    check(logits_BTK=logits_BTK, support_mask_BTK=support_mask_BTK)
    if support_mask_BTK is not None:
        logits_BTK = logits_BTK.masked_fill(~support_mask_BTK, torch.finfo(logits_BTK.dtype).min)
    return 1 - logits_BTK.softmax(-1).square().sum(-1)
