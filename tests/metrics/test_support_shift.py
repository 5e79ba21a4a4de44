"""The table of support shift from scores and from answers."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.metrics.support_shift import PARTS, Judge, support_shift


def answers(scores: list[list[float]], name: str = "design") -> list[dict]:
    return [
        {
            "problem": p,
            "samples": [
                {"right": None if x != x else x > 0.5, "scores": {name: None if x != x else x}}
                for x in row
            ],
        }
        for p, row in enumerate(scores)
    ]


def test_the_table_holds_shares_with_intervals_and_its_identities():
    base = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.9, 0.9], [0.1, 0.1]])
    trained = torch.tensor([[0.9, 0.9], [0.2, 0.8], [0.1, 0.2], [0.1, 0.7]])
    table = support_shift(base, trained, 0.6, 2)
    assert [table[name][0] for name in PARTS] == [0.25, 0.5, 0.25, 0.0]
    assert table["esr"][0] == 2.0
    assert table["base_any"][0] == 0.5
    assert table["trained_any"][0] == 0.75
    for low, high in (values[1:] for values in table.values()):
        assert low <= high
    assert all(table[name][1] <= table[name][0] <= table[name][2] for name in table)
    # with k = all samples the unbiased pass@k is that of any sample
    assert table["base_pass"] == table["base_any"]
    gain = table["expansion"][0] - table["shrinkage"][0]
    assert table["pass_difference"][0] == pytest.approx(gain)
    one = support_shift(base, trained, 0.6, 1)
    assert one["base_pass"][0] == pytest.approx((0.5 + 0 + 1 + 0) / 4)


def test_two_judges_read_the_same_answers():
    scores = [[0.2, 0.9], [math.nan, 0.1]]
    by_reward = Judge("design", 0.5).scores(answers(scores))
    assert by_reward[0].tolist() == [0.2, 0.9]
    assert by_reward[1].isnan().tolist() == [True, False]
    right = Judge().scores(answers(scores))
    assert right[0].tolist() == [0.0, 1.0]
    assert str(Judge()) == "right"
    assert str(Judge("design", 0.85)) == "design ≥ 0.85"


def test_a_reward_that_the_answers_lack_ends_in_one_line():
    with pytest.raises(UserError, match="no scores of the reward 'other': there are design"):
        Judge("other", 0.5).scores(answers([[0.1]]))
    plain = [{"samples": [{"right": True}]}]
    with pytest.raises(UserError, match="they hold no scores"):
        Judge("other", 0.5).scores(plain)
