"""The table of verdicts, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_mpo.rewards import Completion, ExactAnswer, MathAnswer, Reward
from tests.support.verdicts import EXACT, MATH, NONE, RIGHT, UNJUDGED, WRONG


def verdict(reward: Reward, completion: Completion) -> str:
    (score,), (answered,) = reward.score([completion]), reward.answered([completion])
    if score is None:
        return UNJUDGED
    return RIGHT if score else WRONG if answered else NONE


def completion(target: str, text: str) -> Completion:
    return Completion("prompt", text, target, 3, True, {})


@pytest.mark.parametrize(("target", "text", "expected"), MATH, ids=range(len(MATH)))
def test_math_answer(target: str, text: str, expected: str) -> None:
    assert verdict(MathAnswer(), completion(target, text)) == expected


@pytest.mark.parametrize(("target", "text", "expected"), EXACT, ids=range(len(EXACT)))
def test_exact_answer(target: str, text: str, expected: str) -> None:
    assert verdict(ExactAnswer(), completion(target, text)) == expected


@pytest.mark.parametrize(
    ("reward", "text"), [(MathAnswer(), "The answer is 5"), (ExactAnswer(), "; 5")]
)
def test_thoughts_that_the_prompt_opened(reward: Reward, text: str) -> None:
    opened = replace(completion("5", text), thinking=True)
    assert verdict(reward, opened) == NONE
    assert verdict(reward, replace(opened, text=f"or 6</think>{text}")) == RIGHT
