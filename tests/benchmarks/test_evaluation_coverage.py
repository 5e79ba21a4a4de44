"""Of 400 simulated evaluations, 95 % intervals hold the known accuracy in 93 to 97 %."""

from __future__ import annotations

import pytest

from benchmarks.evaluation_coverage import SHAPES, coverage


@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_cover_the_truth(shape):
    shares = coverage(SHAPES[shape], runs=400, problems=200, completions=8)
    assert shares.keys() == {"pass@1", "pass@8", "gain of pass@1"}
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares
