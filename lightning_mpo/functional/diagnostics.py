"""Numbers that say how training goes, per element or as sums, to be added over micro-batches and ranks.

None of them carries a gradient. What a ratio, a support or a score is: core-algorithms 1.7, 2.3 and 2.2.
"""

import math

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, same


@torch.no_grad()
def clip_fraction(log_ratios_BU: Tensor, advantages_BU: Tensor, *, low: float, high: float) -> Tensor:
    """Mark the actions whose gradient the clip has stopped.

        1 if (A > 0 and r > 1 + high) or (A < 0 and r < 1 - low), else 0      (core-algorithms 0, the mask form)

    The fraction falls mechanically with the share of future tokens in a block (core-algorithms 1.7 [V]): it is no
    evidence of better credit.

    Args:
        log_ratios_BU: log(π / π_old) of each action, shape ``[B, U]``, nats.
        advantages_BU: Advantages of the actions, shape ``[B, U]``.
        low: How far the ratio may fall below 1, in (0, 1).
        high: How far the ratio may rise above 1.

    Returns:
        0 or 1 per action, shape ``[B, U]``; average with the weights of the actions.

    Raises:
        ValueError: If the shapes differ.

    >>> clip_fraction(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, -1.0]]), low=0.2, high=0.2)
    tensor([[1., 0.]])
    """
    check(log_ratios_BU=log_ratios_BU, advantages_BU=advantages_BU)
    above = (advantages_BU > 0) & (log_ratios_BU > math.log1p(high))
    below = (advantages_BU < 0) & (log_ratios_BU < math.log1p(-low))
    return (above | below).to(log_ratios_BU)


@torch.no_grad()
def weight_moments(log_weights: Tensor, mask: Tensor) -> Tensor:
    """Sum importance weights, their squares, and their number, ready to be added over batches.

        (Σ w, Σ w², n),   w = exp(log w)

    Args:
        log_weights: Log importance weights, any shape, nats. Never read outside the mask.
        mask: Which of them count, bool, same shape.

    Returns:
        The three sums, shape ``[3]``, float64.

    Raises:
        ValueError: If the shapes differ.

    >>> weight_moments(torch.tensor([0.0, 0.0, 9.0]), torch.tensor([True, True, False])).tolist()
    [2.0, 2.0, 2.0]
    """
    same(log_weights=log_weights, mask=mask)
    weights = log_weights[mask].double().exp()
    return torch.stack([weights.sum(), weights.square().sum(), mask.sum().double()])


@torch.no_grad()
def effective_sample_size(moments: Tensor) -> Tensor:
    """Turn sums of importance weights into the share of samples that they are worth.

        (Σ w)² / (n Σ w²)                                     (Kish 1965)

    Args:
        moments: Sums from :func:`weight_moments`, added over all batches, shape ``[3]``.

    Returns:
        A scalar in (0, 1], 1 if all weights are equal; NaN without a sample.

    >>> effective_sample_size(torch.tensor([4.0, 10.0, 4.0]))
    tensor(0.4000)
    """
    total, squares, number = moments
    return total.square() / (squares * number)


@torch.no_grad()
def kept_mass(logprobs: Tensor, support_logprobs: Tensor) -> Tensor:
    """Compute the probability that the full policy gives to a support, from one token's two log-probabilities.

        Z = Σ_{v∈P} π(v) = exp(log π(o) - log π_P(o))         (core-algorithms 2.7 invariant 7 [V])

    A ratio that equals Z on policy is the classic bug: a full-vocabulary numerator over a truncated denominator.

    Args:
        logprobs: Log-probabilities under the full softmax, any shape, nats.
        support_logprobs: Log-probabilities of the same tokens under the softmax over the support, same shape.

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
def score_variance(logits_BTK: Tensor, support_mask_BTK: Tensor | None = None) -> Tensor:
    """Compute the variance of the score, the gradient of a sampled token's log-probability with respect to the logits.

        tr Cov(e_o - π_P) = 1 - Σ_{v∈P} π_P(v)²               (core-algorithms 2.2 [I][V]; not the authors' theorem)

    On a top-K set it is never above that of the full softmax.

    Args:
        logits_BTK: Logits on the support, temperature applied, shape ``[B, T, K]``.
        support_mask_BTK: False for slots that are not in the support, shape ``[B, T, K]``. None: all are.

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
