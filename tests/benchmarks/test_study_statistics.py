"""The statistics of a study against scipy, and against values computed by hand."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from tests.support.study_scripts import statistics

PAIRS = ([0.81, 0.84, 0.79, 0.90, 0.86], [0.78, 0.80, 0.80, 0.85, 0.80])
DIFFERENCES = [a - b for a, b in zip(*PAIRS, strict=True)]


def test_the_interval_is_scipys():
    mean, half = statistics.interval(DIFFERENCES)
    low, high = stats.ttest_rel(*PAIRS).confidence_interval(0.95)
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert statistics.interval([1.0, 2.0, 3.0]) == (
        2.0,
        pytest.approx(4.303 / math.sqrt(3), rel=1e-3),
    )


def test_one_value_has_no_interval_and_no_p():
    mean, half = statistics.interval([0.5])
    assert mean == 0.5
    assert math.isnan(half)
    assert math.isnan(statistics.p_value([0.5]))
    assert math.isnan(statistics.detectable([0.5]))


def test_p_is_scipys_paired_test():
    assert statistics.p_value(DIFFERENCES) == pytest.approx(stats.ttest_rel(*PAIRS).pvalue)
    assert statistics.p_value([0.0, 0.0]) == 1
    assert statistics.p_value([0.25, 0.25]) == 0


def test_holm_by_hand():
    # sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 -> not below 0.06, 0.04 * 1 -> not below 0.06
    assert statistics.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_a_comparison_without_runs_counts_in_the_correction():
    first, second = statistics.holm([0.02, math.nan])
    assert first == pytest.approx(0.04)
    assert math.isnan(second)


def test_the_detectable_difference():
    # quantiles of t with one degree of freedom at 0.975 and 0.8; the standard error is 1
    assert statistics.detectable([0.0, 2.0]) == pytest.approx(12.706 + 1.376, abs=1e-3)
    # about the power of the noncentral t, which the sum of quantiles approximates
    for count in (5, 20):
        values = [float(i % 2) for i in range(count)]
        error = stats.sem(values)
        shift = statistics.detectable(values) / error
        bound = stats.t.ppf(0.975, count - 1)
        assert stats.nct.sf(bound, count - 1, shift) == pytest.approx(0.8, abs=0.03)


def test_the_area_is_a_mean_over_rollouts():
    assert statistics.area([(0, 0.0), (2, 1.0), (6, 1.0)]) == pytest.approx((1 + 4) / 6)
    assert statistics.area([(0, 0.5), (10, 0.5)]) == 0.5
    assert statistics.area([(0, 0.5)]) == 0.5


def test_a_level_is_reached_on_a_line_between_validations():
    curve = [(0, 0.5), (2, 0.7), (4, 0.6), (6, 0.9)]
    assert statistics.first_reach(curve, 0.6) == pytest.approx(1.0)
    assert statistics.first_reach(curve, 0.5) == 0
    assert statistics.first_reach(curve, 0.75) == pytest.approx(5.0)
    assert statistics.first_reach(curve, 0.95) is None
