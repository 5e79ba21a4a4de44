"""`SpanShare` and `DrawnDecision`: a naive count of right decisions, and noise that cancels."""

from __future__ import annotations

import random
from statistics import fmean, pstdev

import pytest

from lightning_mpo.data.spans import Spans
from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion
from lightning_mpo.rewards.spans import DrawnDecision, SpanShare


def completion(text: str, target: str, length: int, prompt: str = "p", end: bool = True):
    ids = tuple(range(len(text) + end))
    return Completion(prompt, text, target, len(ids), end, {"span_length": length}, token_ids=ids)


def naive(text: str, target: str, length: int) -> float:
    """Count the decisions that agree, character by character."""
    wrong = {i // length for i, c in enumerate(target) if text[i : i + 1] != c}
    return 1 - len(wrong) / (len(target) // length)


CASES = [
    ("aixbjy", "aixbjy", 3),
    ("aixbjy", "aixckz", 3),
    ("aixbj", "aixbjy", 3),
    ("aixbjyaix", "aixbjy", 3),
    ("", "aixbjy", 3),
    ("abca", "abcd", 1),
    ("babc", "abcd", 1),
]


@pytest.mark.parametrize(("text", "target", "length"), CASES)
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_the_sum_is_the_share_of_right_decisions(text, target, length, noise):
    (scores,) = SpanShare(noise).token_scores([completion(text, target, length)])
    assert len(scores) == len(text) + 1
    assert sum(scores) == pytest.approx(naive(text, target, length), abs=1e-9)
    decisions = len(target) // length
    for i in range(min(decisions, len(text) // length)):
        right = text[i * length : (i + 1) * length] == target[i * length : (i + 1) * length]
        due = scores[i * length : (i + 1) * length]
        assert sum(due) == pytest.approx(right / decisions, abs=1e-9)
        if noise == 0 or length == 1:
            assert due == pytest.approx([right / decisions / length] * length, abs=1e-12)
    assert not any(scores[len(target) :])


def test_noise_has_the_deviation_of_the_option():
    random.seed(0)
    data = Spans(train_problems=100, held_out_problems=10)
    rows = [completion(row.target, row.target, 3) for row in data.splits.train]
    noise = [x - 1 / 72 for scores in SpanShare(0.5).token_scores(rows) for x in scores[:72]]
    assert pstdev(noise) * 24 == pytest.approx(0.5, rel=0.05)
    assert fmean(noise) == pytest.approx(0, abs=1e-9)
    first, second, _ = noise[::3], noise[1::3], noise[2::3]
    correlation = fmean(a * b for a, b in zip(first, second, strict=True)) / pstdev(noise) ** 2
    assert correlation == pytest.approx(-0.5, abs=0.1), "three numbers that sum to 0"


def test_a_drawn_decision_estimates_the_share():
    data = Spans(train_problems=2000, held_out_problems=10)
    rows = [completion(row.solution, row.target, 3, row.prompt) for row in data.splits.train]
    drawn = DrawnDecision().score(rows)
    share = fmean(naive(row.text, row.target, 3) for row in rows)
    assert set(drawn) == {0.0, 1.0}
    assert fmean(drawn) == pytest.approx(share, abs=5 * 0.5 / 2000**0.5)
    assert drawn == DrawnDecision().score(rows), "the same decision each time"
    right = [completion(row.target, row.target, 3, row.prompt) for row in rows]
    assert DrawnDecision().score(right) == [1.0] * 2000


def test_what_they_are():
    assert (SpanShare.is_accuracy, DrawnDecision.is_accuracy) == (False, True)
    assert (SpanShare().weight, DrawnDecision().weight) == (1.0, 0.0)


@pytest.mark.parametrize("reward", [SpanShare(), DrawnDecision()])
def test_data_without_decisions_are_refused(reward):
    reward.check_columns(["span_length"])
    with pytest.raises(UserError, match="reads the column `span_length`"):
        reward.check_columns([])


@pytest.mark.parametrize("noise", [-1, float("nan")])
def test_noise_is_not_negative(noise):
    with pytest.raises(UserError, match="`SpanShare.noise`"):
        SpanShare(noise)
