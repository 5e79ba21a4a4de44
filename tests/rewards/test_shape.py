from __future__ import annotations

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import (
    Completion,
    Finished,
    LengthCost,
    LengthRange,
    MathAnswer,
    OverlongPenalty,
    RepetitionPenalty,
    score_all,
)
from lightning_mpo.rewards.text import ExactAnswer


def completion(text: str, finished: bool, tokens: int = 1) -> Completion:
    return Completion(prompt="", text=text, target="3", tokens=tokens, finished=finished, row={})


def test_finished_is_a_part_and_no_accuracy() -> None:
    batch = [completion(";3", True), completion(";3", False), completion(";4", True)]
    scores = score_all([ExactAnswer(), Finished(weight=0.1)], batch)
    assert scores.by_reward["finished"].tolist() == [1.0, 0.0, 1.0]
    assert [round(value, 6) for value in scores.rewards_B.tolist()] == [1.1, 0.0, 0.1]
    assert scores.correct_B.tolist() == [True, False, False]
    assert MathAnswer.is_accuracy
    assert not Finished.is_accuracy


def test_the_overlong_penalty_is_taken_off_and_says_nothing_of_right_and_wrong() -> None:
    batch = [completion(";3", True, n) for n in (6, 7, 10, 12)]
    scores = score_all(
        [ExactAnswer(), OverlongPenalty(limit=10, buffer=4, factor=2.0, weight=0.5)], batch
    )
    assert scores.by_reward["overlong_penalty"].tolist() == [0.0, -0.5, -2.0, -2.0]
    assert scores.rewards_B.tolist() == [1.0, 0.75, 0.0, 0.0]
    assert scores.correct_B.all()
    assert not OverlongPenalty.is_accuracy


@pytest.mark.parametrize(
    "option", [{"limit": 0}, {"buffer": 0}, {"buffer": 11}, {"factor": 0.0}, {"factor": -1.0}]
)
def test_a_penalty_that_is_none_is_refused(option: dict) -> None:
    with pytest.raises(UserError, match=f"`OverlongPenalty.{next(iter(option))}` must be"):
        OverlongPenalty(**{"limit": 10, "buffer": 4} | option)


def test_lengths_and_repetitions() -> None:
    batch = [completion("", True, n) for n in (0, 3, 4, 5)]
    assert LengthRange(3, 4).score(batch) == [0.0, 1.0, 1.0, 0.0]
    assert LengthCost(0.25).score(batch) == [0.0, -0.75, -1.0, -1.25]
    ids = [(), (1, 2), (1, 2, 3, 4), (1, 2, 1, 2, 1), (7,) * 9]
    rows = [Completion("", "", "", 1, True, {}, token_ids=row) for row in ids]
    assert RepetitionPenalty(2, factor=2.0).score(rows) == [0.0, 0.0, 0.0, -1.0, -1.75]
    for owner in (LengthRange, LengthCost, RepetitionPenalty):
        assert not owner.is_accuracy


def test_lengths_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match=r"`LengthRange.longest` must be at least 5, got 4"):
        LengthRange(5, 4)
    with pytest.raises(UserError, match=r"no response is longer than `rollout.max_new_tokens` = 4"):
        LengthRange(5, 9).check(4)
    LengthRange(5, 9).check(5)
    with pytest.raises(UserError, match=r"`LengthCost.per_token` must be positive, got -1"):
        LengthCost(-1)
