"""Intervals, tests and learning curves of a study: plain functions of numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from scipy import stats


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % t-interval; nan for fewer than two values."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    t = stats.t.ppf(0.975, len(values) - 1)
    return statistics.mean(values), float(t * stats.sem(values))


def detectable(values: Sequence[float]) -> float:
    """Return the true difference that a t-test with this number and spread of values detects with power 80 %."""
    freedom = len(values) - 1
    if freedom < 1:
        return math.nan
    quantiles = stats.t.ppf(0.975, freedom) + stats.t.ppf(0.8, freedom)
    return float(quantiles * stats.sem(values))


def p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a paired t-test; nan for fewer than two differences."""
    if len(differences) < 2:
        return math.nan
    mean, error = statistics.mean(differences), float(stats.sem(differences))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that Holm's method corrects for their number m.

    The k-th smallest p-value is multiplied by m - k + 1, and is at least the corrected one before
    it. A p-value that is nan stays nan. It counts in m, as its test will be made later.
    """
    order = sorted(
        (i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i]
    )
    corrected, largest = [math.nan] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected


def area(points: Sequence[tuple[float, float]]) -> float:
    """Return the mean height of a line through points (rollouts, value), by the trapezoid rule."""
    if len(points) < 2:
        return points[0][1] if points else math.nan
    pairs = list(itertools.pairwise(points))
    total = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairs)
    return total / (points[-1][0] - points[0][0])


def first_reach(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Return where a line through points (rollouts, value) first reaches a level; None: nowhere."""
    if points and points[0][1] >= level:
        return points[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 >= level:
            return x0 + (level - y0) / (y1 - y0) * (x1 - x0)
    return None
