"""A validation on two processes gives the answers and counts of one."""

from __future__ import annotations

import json

import pytest

from tests.support.two_processes import run_script
from tests.support.two_ranks_evaluated import validate


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(tmp_path):
    """Three batches: the sampler of one process is padded with a batch of the other."""
    (tmp_path / "two").mkdir()
    single = validate(tmp_path / "one", 1)
    run_script("two_ranks_evaluated.py", tmp_path / "two")
    one, two = (
        (tmp_path / name / "held_out" / "validate.jsonl").read_text() for name in ("one", "two")
    )
    assert len(one.splitlines()) == 1 + 5
    assert one == two
    assert json.loads((tmp_path / "two" / "metrics.json").read_text()) == single
    assert 0 < single["val/pass_at_1"] < single["val/pass_at_3"] <= 1
