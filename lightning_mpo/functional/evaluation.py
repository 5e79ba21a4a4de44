"""Accuracy of sampled answers over problems, and intervals whose unit is the problem.

Completions of one problem are alike, so an interval that counts each of them as an observation is
too narrow. P is the number of problems, G that of completions of each. Probabilities are float64.
"""

import math
from collections import Counter
from functools import lru_cache

import torch
from torch import Tensor

from lightning_mpo.functional.shapes import same


def pass_at_k(right_P: Tensor, drawn_P: Tensor, k: int) -> Tensor:
    """Estimate for each problem the probability that at least one of k completions is right.

        1 − C(n − c, k) / C(n, k)          (Chen et al. 2021, eq. 1; unbiased for n ≥ k)

    Args:
        right_P: c, right completions of each problem, floating point. Shape ``[P]``.
        drawn_P: n, completions of each problem, floating point. Shape ``[P]``.
        k: Completions that a problem may take.

    Returns:
        Probabilities, shape ``[P]``, float64.

    Raises:
        ValueError: If k is below 1 or above n, c is not in [0, n], or the shapes differ.

    >>> pass_at_k(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0]), k=2)
    tensor([0.6667, 1.0000], dtype=torch.float64)
    """
    same(right_P=right_P, drawn_P=drawn_P)
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}")
    if len(drawn_P) and drawn_P.min() < k:
        raise ValueError(f"`drawn_P` must be at least k = {k}, got {drawn_P.min():g}")
    drawn_P = drawn_P.double()
    wrong_P = drawn_P - right_P
    if bool(((wrong_P < 0) | (right_P < 0)).any()):
        raise ValueError("`right_P` must be from 0 to `drawn_P`")
    before_k = torch.arange(k, dtype=torch.float64, device=right_P.device)
    # the k draws without replacement are all wrong; a factor is 0 if fewer than k are wrong
    return 1 - ((wrong_P[:, None] - before_k) / (drawn_P[:, None] - before_k)).prod(1)


def majority_at_k(votes_PG: Tensor, k: int) -> Tensor:
    """Estimate for each problem the probability that the most frequent answer of k is right.

        maj@k = mean over the C(G, k) draws of [the right answer wins] / (answers that tie)

    The expectation over all draws is exact. So it depends neither on the order of the completions
    nor on random numbers, and has less variance than the vote of the first k. Ties are broken at
    random. If nobody votes, the answer is wrong.

    Args:
        votes_PG: Answer of each completion: 0 if it is right, a number above 0 for each different
            wrong answer, −1 for none. Shape ``[P, G]``, int64.
        k: Completions that vote.

    Returns:
        Probabilities, shape ``[P]``, float64.

    Raises:
        ValueError: If k is below 1 or above G.

    >>> majority_at_k(torch.tensor([[0, 0, 1], [0, 1, -1]]), k=3)
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    G = votes_PG.shape[1]
    if not 1 <= k <= G:
        raise ValueError(f"`k` must be from 1 to {G}, the number of completions, got {k}")
    values = []
    for votes in votes_PG.tolist():
        counts = Counter(votes)
        right, silent = counts.pop(0, 0), counts.pop(-1, 0)
        values.append(_right_wins(right, tuple(sorted(counts.values())), silent, k))
    return torch.tensor(values, dtype=torch.float64, device=votes_PG.device)


@lru_cache(maxsize=4096)
def _right_wins(right: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """Return the share of draws of k votes in which the right answer wins; ties count in part."""
    wins = 0.0
    for most in range(1, min(right, k) + 1):
        # ways to draw others at most `most` times each, by (votes drawn, answers drawn that often)
        ways = {(most, 1): math.comb(right, most)}
        for count in others:
            more: Counter[tuple[int, int]] = Counter()
            for (drawn, tied), number in ways.items():
                for taken in range(min(count, most, k - drawn) + 1):
                    key = (drawn + taken, tied + (taken == most))
                    more[key] += number * math.comb(count, taken)
            ways = dict(more)
        # the rest are completions without an answer
        wins += sum(
            number * math.comb(silent, k - drawn) / tied for (drawn, tied), number in ways.items()
        )
    return wins / math.comb(right + sum(others) + silent, k)


@lru_cache(maxsize=4096)
def student_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution.

    The distribution function is the finite sum of Abramowitz and Stegun 26.7.3 and 26.7.4, which is
    inverted by bisection.

    Args:
        probability: P(t ≤ quantile), from 0.5 to below 1.
        degrees: Degrees of freedom, at least 1.

    Raises:
        ValueError: If an argument is out of range.

    >>> round(student_quantile(0.975, 1), 3), round(student_quantile(0.975, 199), 3)
    (12.706, 1.972)
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(
            "`probability` must be in [0.5, 1) and `degrees` at least 1, got "
            f"{probability} and {degrees}"
        )
    low, high = 0.0, math.pi / 2  # of the angle atan(t / √ν)
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, degrees) < 2 * probability - 1 else (low, angle)
    return math.tan(low) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """Return P(|t| ≤ √ν tan(angle))."""
    odd = degrees % 2
    j = torch.arange(1, max(1, degrees // 2), dtype=torch.float64)
    squares = math.cos(angle) ** 2
    # 1 + 1/2 cos² + (1·3)/(2·4) cos⁴ + …, for odd ν with the factors 2/3, 4/5, …
    factors = 2 * j / (2 * j + 1) if odd else (2 * j - 1) / (2 * j)
    terms = 1 + float((factors * squares).cumprod(0).sum())
    if not odd:
        return math.sin(angle) * terms
    extra = math.sin(angle) * math.cos(angle) * terms if degrees > 1 else 0.0
    return 2 / math.pi * (angle + extra)


def mean_interval(
    values_P: Tensor, low: float = 0.0, high: float = 1.0, level: float = 0.95
) -> Tensor:
    """Return the mean over problems, and a confidence interval of it.

        m ± t(P − 1) · s / √P,          cut to [low, high]

    If all values are equal, s = 0 says nothing about values that were not seen. Their probability
    is at most u = z² / (P + z²), the upper end of Wilson's interval for 0 of P. So the interval is
    [m − u (m − low), m + u (high − m)]. It does not shrink to a point.

    Args:
        values_P: A value of each problem, such as its pass@k. Shape ``[P]``.
        low: Least value that a problem can have.
        high: Largest value; infinity: none, and equal values then have an interval of one point.
        level: Probability that the interval holds the true mean, if problems are drawn at random.

    Returns:
        Mean, lower and upper end, shape ``[3]``, float64; NaN without a problem.

    Raises:
        ValueError: If the level is not between 0 and 1.

    >>> mean_interval(torch.tensor([0.0, 0.5, 1.0, 0.5]))
    tensor([0.5000, 0.0000, 1.0000], dtype=torch.float64)
    >>> mean_interval(torch.ones(20))
    tensor([1.0000, 0.8389, 1.0000], dtype=torch.float64)
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}")
    P, values_P = len(values_P), values_P.double()
    if not P:
        return torch.full((3,), torch.nan, dtype=torch.float64)
    mean = values_P.mean().item()
    deviation = values_P.std().item() if P > 1 else 0.0
    if deviation > 1e-9:
        half = student_quantile((1 + level) / 2, P - 1) * deviation / math.sqrt(P)
        ends = (max(low, mean - half), min(high, mean + half))
    else:
        square = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item() ** 2
        unseen = square / (P + square)
        below, above = (unseen * d if math.isfinite(d) else 0.0 for d in (mean - low, high - mean))
        ends = (mean - below, mean + above)
    # rounding must not put the mean outside
    return torch.tensor([mean, min(ends[0], mean), max(ends[1], mean)], dtype=torch.float64)


def paired_difference(first_P: Tensor, second_P: Tensor, level: float = 0.95) -> Tensor:
    """Return the mean of second − first over the same problems, and its confidence interval.

    Differences of difficulty between problems cancel, so it is narrower than two intervals apart.

    Args:
        first_P: Values in [0, 1], one of each problem. Shape ``[P]``.
        second_P: Values of the same problems in the same order. Shape ``[P]``.
        level: As in :func:`mean_interval`.

    Returns:
        Mean difference, lower and upper end, shape ``[3]``, float64.

    Raises:
        ValueError: If the shapes differ or the level is not between 0 and 1.

    >>> paired_difference(torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    tensor([ 0.5000, -0.4187,  1.0000], dtype=torch.float64)
    """
    same(first_P=first_P, second_P=second_P)
    return mean_interval(second_P.double() - first_P.double(), -1.0, 1.0, level)
