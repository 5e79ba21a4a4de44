"""Numbers that say how training goes, per element or as sums, to be added over micro-batches and
ranks.

None of them carries a gradient. The list is in docs/algorithms.md 15.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import check, same
from lightning_mpo.functional.surrogates import safe_ratio


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
def clip_distance(log_ratios_BU: Tensor, advantages_BU: Tensor) -> Tensor:
    """Measure how far the ratio has gone in the direction in which the clip stops the gradient.

        d = sign(A) (r - 1)     a clip of ε on both sides stops an action if and only if d > ε  [I]

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
    """Find the ε that stops a given share of the actions: what makes the clips of two action spaces
    comparable.

    Args:
        distances_BU: From :func:`clip_distance`, shape ``[B, U]``. Never read outside the mask.
        mask_BU: Which actions there are, shape ``[B, U]``.
        fraction: Share of them to stop, in [0, 1); the nearest whole number of actions is stopped.

    Returns:
        ε halfway between the nearest action that is stopped and the nearest that is let go; just
        beyond all actions if none is to be stopped; NaN if no ε above 0 stops as many.

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
    """Split the squared length of a mean gradient into what is signal and what is left of the
    noise.

        mean = (1/P) Σ_p x_p,   noise = tr Cov(mean) = Σ_p |x_p - mean|² / (P (P - 1)),
        signal = |mean|² - noise

    Both are unbiased if the x_p are independent draws, as E|mean|² = |E x|² + tr Cov(mean). The
    signal of a finite sample may be negative; signal / noise is the signal-to-noise ratio of a step
    on P prompts and grows in proportion to P.

    Args:
        total_square: |Σ_p x_p|².
        squares: Σ_p |x_p|².
        count: P, at least 2.

    Returns:
        Signal and noise, in units of the squared gradient.

    Raises:
        ValueError: If there are fewer than two gradients.

    >>> # of 1 and 3: mean 2, variance of the mean 1
    >>> signal_and_noise(total_square=16.0, squares=10.0, count=2)
    (3.0, 1.0)
    """
    if count < 2:
        raise ValueError(f"`count` must be at least 2, got {count}")
    length = total_square / count**2
    noise = max(squares / count - length, 0.0) / (count - 1)
    return length - noise, noise


def jackknife_error(estimates: Sequence[float]) -> float:
    """Compute the standard error of an estimate from what it is without each block of the data in
    turn.

        sqrt((J - 1)/J Σ_j (θ_j - mean θ)²)
                                       (the delete-one-block jackknife, Quenouille 1956, Tukey 1958)

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
    """Average over tokens, with a standard error whose unit is the prompt: tokens of one prompt are
    alike.

        mean = Σ_p x_p / Σ_p n_p,   error² = P/(P - 1) Σ_p (x_p - mean n_p)² / (Σ_p n_p)²
                                                                       (ratio estimator, linearised)

    Args:
        totals_P: x_p, what the tokens of each prompt add up to, shape ``[P]``.
        counts_P: n_p, how many tokens they are, shape ``[P]``.

    Returns:
        Mean and standard error; NaN for a mean without tokens, and for an error without a second
        prompt.

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
