"""Numbers that say how training goes, per element or as sums, to be added over micro-batches and ranks.

None of them carries a gradient. What a ratio, a support or a score is: core-algorithms 1.7, 2.3 and 2.2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, same
from lightning_mpo.functional.surrogates import safe_ratio


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
def support_overlap(support_BTK: Tensor, candidates_BTK: Tensor, support_mask_BTK: Tensor | None = None) -> Tensor:
    """Measure how much of a stored support would still be chosen: its overlap with the best tokens of today's policy.

        |top-n(π_θ) ∩ P| / n,   n = |P|                       (core-algorithms 2.3, metrics)

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
    slots_BTK = torch.ones_like(support_BTK, dtype=torch.bool) if support_mask_BTK is None else support_mask_BTK
    size_BT = slots_BTK.sum(-1)
    today_BTK = torch.arange(candidates_BTK.shape[-1], device=candidates_BTK.device) < size_BT.unsqueeze(-1)
    same = (
        (support_BTK.unsqueeze(-1) == candidates_BTK.unsqueeze(-2)) & slots_BTK.unsqueeze(-1) & today_BTK.unsqueeze(-2)
    )
    return same.any(-2).sum(-1) / size_BT.clamp(min=1)


@torch.no_grad()
def could_not_stop(
    support_BTK: Tensor, support_mask_BTK: Tensor | None, mask_BT: Tensor, ended_B: Tensor, ends: Sequence[int]
) -> Tensor:
    """Mark the responses that ran into the length limit and had an end token in none of their supports.

    Outside a support a token has probability 0: such a response could not have stopped (core-algorithms 2.8).

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
    check(support_BTK=support_BTK, support_mask_BTK=support_mask_BTK, mask_BT=mask_BT, ended_mask_B=ended_B)
    possible_BTK = torch.isin(support_BTK, torch.tensor(list(ends), dtype=support_BTK.dtype, device=support_BTK.device))
    if support_mask_BTK is not None:
        possible_BTK = possible_BTK & support_mask_BTK
    return ~ended_B & ~(possible_BTK.any(-1) & mask_BT).any(-1)


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


@torch.no_grad()
def clip_distance(log_ratios_BU: Tensor, advantages_BU: Tensor) -> Tensor:
    """Measure how far the ratio has gone in the direction in which the clip stops the gradient.

        d = sign(A) (r - 1)           a clip of ε on both sides stops an action if and only if d > ε  [I]

    Args:
        log_ratios_BU: log(π / π_old) of each action, shape ``[B, U]``, nats.
        advantages_BU: Advantages of the actions, shape ``[B, U]``.

    Returns:
        Distances, shape ``[B, U]``; 0 where the advantage is 0.

    Raises:
        ValueError: If the shapes differ.

    >>> clip_distance(torch.tensor([[1.5, 1.5]]).log(), torch.tensor([[1.0, -1.0]]))
    tensor([[ 0.5000, -0.5000]])
    """
    check(log_ratios_BU=log_ratios_BU, advantages_BU=advantages_BU)
    return advantages_BU.sign() * (safe_ratio(log_ratios_BU) - 1)


@torch.no_grad()
def matching_clip(distances_BU: Tensor, mask_BU: Tensor, fraction: float) -> float:
    """Find the ε that stops a given share of the actions: what makes the clips of two action spaces comparable.

    Args:
        distances_BU: From :func:`clip_distance`, shape ``[B, U]``. Never read outside the mask.
        mask_BU: Which actions there are, shape ``[B, U]``.
        fraction: Share of them to stop, in [0, 1); the nearest whole number of actions is stopped.

    Returns:
        ε halfway between the nearest action that is stopped and the nearest that is let go; just beyond all actions
        if none is to be stopped; NaN if no ε above 0 stops as many.

    Raises:
        ValueError: If the shapes differ, there is no action, or the fraction is out of range.

    >>> round(matching_clip(torch.tensor([[0.1, 0.3, -0.2, 0.2]]), torch.ones(1, 4).bool(), 0.5), 4)
    0.15
    """
    check(distances_BU=distances_BU, mask_BU=mask_BU)
    if not 0 <= fraction < 1:
        raise ValueError(f"`fraction` must be in [0, 1), got {fraction}")
    ordered = distances_BU[mask_BU].double().sort(descending=True).values.tolist()
    if not ordered:
        raise ValueError("`mask_BU` must hold an action")
    count = round(fraction * len(ordered))
    if not count:
        return max(ordered[0], 1e-6) * (1 + 1e-6)
    nearest, next_one = ordered[count - 1], ordered[count] if count < len(ordered) else 0.0
    return (nearest + max(next_one, 0.0)) / 2 if nearest > 0 else math.nan


def signal_and_noise(total_square: float, squares: float, count: int) -> tuple[float, float]:
    """Split the squared length of a mean gradient into what is signal and what is left of the noise.

        mean = (1/P) Σ_p x_p,   noise = tr Cov(mean) = Σ_p |x_p - mean|² / (P (P - 1)),   signal = |mean|² - noise

    Both are unbiased if the x_p are independent draws, as E|mean|² = |E x|² + tr Cov(mean). The signal of a finite sample
    may be negative; signal / noise is the signal-to-noise ratio of a step on P prompts and grows in proportion to P.

    Args:
        total_square: |Σ_p x_p|².
        squares: Σ_p |x_p|².
        count: P, at least 2.

    Returns:
        Signal and noise, in units of the squared gradient.

    Raises:
        ValueError: If there are fewer than two gradients.

    >>> signal_and_noise(total_square=16.0, squares=10.0, count=2)  # of 1 and 3: mean 2, variance of the mean 1
    (3.0, 1.0)
    """
    if count < 2:
        raise ValueError(f"`count` must be at least 2, got {count}")
    length = total_square / count**2
    noise = max(squares / count - length, 0.0) / (count - 1)
    return length - noise, noise


def jackknife_error(estimates: Sequence[float]) -> float:
    """Compute the standard error of an estimate from what it is without each block of the data in turn.

        sqrt((J - 1)/J Σ_j (θ_j - mean θ)²)                   (the delete-one-block jackknife, Quenouille 1956, Tukey 1958)

    Args:
        estimates: θ_j, without block j; at least two blocks, about equally large.

    Returns:
        The error, in the unit of the estimate.

    Raises:
        ValueError: If there are fewer than two blocks.

    >>> jackknife_error([2.0, 4.0])
    1.0
    """
    J = len(estimates)
    if J < 2:
        raise ValueError(f"`estimates` must hold at least 2 blocks, got {J}")
    mean = sum(estimates) / J
    return math.sqrt((J - 1) / J * sum((estimate - mean) ** 2 for estimate in estimates))


@torch.no_grad()
def clustered_mean(totals_P: Tensor, counts_P: Tensor) -> tuple[float, float]:
    """Average over tokens, with a standard error whose unit is the prompt: tokens of one prompt are alike.

        mean = Σ_p x_p / Σ_p n_p,   error² = P/(P - 1) Σ_p (x_p - mean n_p)² / (Σ_p n_p)²     (ratio estimator, linearised)

    Args:
        totals_P: x_p, what the tokens of each prompt add up to, shape ``[P]``.
        counts_P: n_p, how many tokens they are, shape ``[P]``.

    Returns:
        Mean and standard error; NaN for a mean without tokens, and for an error without a second prompt.

    Raises:
        ValueError: If the shapes differ.

    >>> clustered_mean(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0]))
    (0.5, 0.25)
    """
    check(totals_P=totals_P, counts_P=counts_P)
    totals, counts, P = totals_P.double(), counts_P.double(), len(totals_P)
    number = float(counts.sum())
    if not number:
        return math.nan, math.nan
    mean = float(totals.sum()) / number
    if P < 2:
        return mean, math.nan
    return mean, math.sqrt(P / (P - 1) * float((totals - mean * counts).square().sum())) / number
