from __future__ import annotations

from lightning_mpo.rewards import Completion, Finished, MathAnswer, score_all
from lightning_mpo.rewards.text import ExactAnswer


def completion(text: str, finished: bool) -> Completion:
    return Completion(prompt="", text=text, target="3", tokens=1, finished=finished, row={})


def test_finished_is_a_part_and_no_accuracy() -> None:
    batch = [completion(";3", True), completion(";3", False), completion(";4", True)]
    scores = score_all([ExactAnswer(), Finished(weight=0.1)], batch)
    assert scores.parts["finished"].tolist() == [1.0, 0.0, 1.0]
    assert [round(value, 6) for value in scores.rewards_B.tolist()] == [1.1, 0.0, 0.1]
    assert scores.correct_B.tolist() == [True, False, False]
    assert MathAnswer.is_accuracy
    assert not Finished.is_accuracy
