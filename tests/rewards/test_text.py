"""`ExactAnswer`, `ChoiceAnswer` and `FormatMatch`."""

from __future__ import annotations

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import ChoiceAnswer, Completion, ExactAnswer, FormatMatch, RewardError


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


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("C", "C"),
        ("(c)", "C"),
        ("c.", "C"),
        ("C) Paris", "C"),
        ("**B**", "B"),
        ("The answer is C", "C"),
        ("The answer is (C).", "C"),
        ("the answer is **C**, as A is wrong", "C"),
        ("Answer: $C$", "C"),
        ("ANSWER: d", "D"),
        ("The answer is A. No, the answer is B.", "B"),
        ("<answer>E</answer> and not (A)", "E"),
        (r"so \boxed{\text{B}}", "B"),
        (r"so \boxed{(B)} and the answer is C", "B"),
        ("Options (A) and (B) fail, so (D)", "D"),
        ("<think>The answer is A</think>The answer is B", "B"),
        ("<think>The answer is A", None),
        ("The answer is a city", None),
        ("The answer is Cairo", None),
        ("A city", None),
        ("I do not know", None),
        ("The answer is not C", None),
        ("F", None),
        ("", None),
    ],
)
def test_a_choice(text: str, choice: str | None) -> None:
    rows = [
        Completion("p", text, target, 3, True, {})
        for target in ("ABCDE" if choice is None else choice)
    ]
    assert ChoiceAnswer().answered(rows) == [choice is not None] * len(rows)
    assert ChoiceAnswer().score(rows) == [float(choice is not None)] * len(rows)
    if choice is not None:
        assert ChoiceAnswer().score(
            [Completion("p", text, "ABCDEA"["ABCDE".index(choice) + 1], 3, True, {})]
        ) == [0.0]


def test_targets_and_letters_of_choices() -> None:
    rows = [Completion("p", "The answer is G", t, 3, True, {}) for t in ("(g)", "G.", "Paris", "")]
    assert ChoiceAnswer("ABCDEFG").score(rows) == [1.0, 1.0, None, None]
    assert ChoiceAnswer().score(rows) == [None] * 4
    assert ChoiceAnswer.is_accuracy
    for letters in ("", "AA", "A1"):
        with pytest.raises(UserError, match="`ChoiceAnswer.letters` must be distinct letters"):
            ChoiceAnswer(letters)


def test_a_format_is_of_the_whole_response_or_of_a_part() -> None:
    form = r"<think>.*</think>\s*<answer>.*</answer>"
    texts = [
        "<think>\na\n</think> <answer>b</answer>",
        "well <think></think><answer></answer>",
        "b",
    ]
    rows = [Completion("p", text, "5", 3, True, {}) for text in texts]
    assert FormatMatch(form).score(rows) == [1.0, 0.0, 0.0]
    assert FormatMatch(form, whole=False).score(rows) == [1.0, 1.0, 0.0]
    with pytest.raises(UserError, match="`FormatMatch.pattern` must be a regular expression"):
        FormatMatch("(")


def test_a_pattern_that_takes_too_long_fails_on_that_response() -> None:
    rows = [Completion("p", text, "5", 3, True, {}) for text in ("aab", "a" * 60)]
    right, failed = FormatMatch(r"(a|aa)+b", seconds=0.3).score(rows)
    assert right == 1.0
    assert isinstance(failed, RewardError)
    assert "`FormatMatch` took more than 0.3 seconds" in str(failed)
