"""`ExactAnswer`."""

from __future__ import annotations

import pytest

from lightning_mpo.rewards import Completion, ExactAnswer


@pytest.mark.parametrize(
    ("text", "finished", "score", "answered"),
    [
        ("2+3; 5", True, 1.0, True),
        ("2+3; 6; 5 \n", True, 1.0, True),
        ("2+3; 5; 6", True, 0.0, True),
        ("2+3; 5", False, 0.0, True),
        ("5", True, 0.0, False),
        ("", True, 0.0, False),
        ("2+3; ", True, 0.0, False),
        ("2+3; 5.0", True, 1.0, True),
    ],
)
def test_exact_answer(text: str, finished: bool, score: float, answered: bool) -> None:
    completion = Completion("p", text, "5", 3, finished, {})
    assert ExactAnswer().score([completion]) == [score]
    assert ExactAnswer().answered([completion]) == [answered]


def test_separator() -> None:
    assert ExactAnswer("=>").score([Completion("p", "a => 5", "5", 3, True, {})]) == [1.0]
