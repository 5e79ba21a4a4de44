"""Kinds of answers: each is right or wrong as its kind says, whatever the row."""

from __future__ import annotations

import pytest

from lightning_mpo.rewards.answers import (
    FORMS,
    GOLD,
    KINDS,
    Sample,
    increased,
    options_of,
    place_of,
    replaced,
    right_answers,
    same,
    samples,
)
from lightning_mpo.types import PromptRow

ROWS = [
    PromptRow("76-25=", "51", "76 - 25 = 51"),
    PromptRow("50+1=", "51.0", "50 + 1 = 51.0"),
    PromptRow("900+300=", "1200", "There are 1,200."),
    PromptRow("Which?", "B"),
    PromptRow("Write a poem.", ""),
]


def test_forms_hold_the_target_and_a_wrong_demonstration_is_no_right_answer():
    assert right_answers(ROWS[3]) == {
        "bare": "B",
        "sentence": "The answer is B.",
        "boxed": "\\boxed{B}",
        "hashes": "#### B",
        "tagged": "<answer>B</answer>",
        "separated": ";B",
    }
    assert right_answers(ROWS[2])["solution"] == "There are 1,200."
    assert "solution" not in right_answers(PromptRow("1+1=", "2", "1+1=3"))
    assert right_answers(PromptRow("Write a poem.", "", "Roses")) == {"solution": "Roses"}
    assert right_answers(ROWS[4]) == {}


@pytest.mark.parametrize(
    ("text", "target", "place"),
    [
        ("512 or 51", "51", (7, 9)),
        ("51.5 or 151", "51", None),
        ("51.", "51", (0, 2)),
        ("-51", "51", None),
        ("x = -51", "-51", (4, 7)),
        ("1,200", "1200", (0, 5)),
        ("$\\frac{1}{2}$", "\\frac{1}{2}", (1, 12)),
        ("abc", "b", None),
        ("", "51", None),
    ],
)
def test_a_target_within_another_number_is_no_mention(text, target, place):
    assert place_of(text, target) == place


@pytest.mark.parametrize(
    ("target", "next_target"),
    [
        ("51", "52"),
        ("-3", "-4"),
        ("1/2", "1/3"),
        ("\\frac{1}{2}", "\\frac{1}{3}"),
        ("1,999", "2000"),
        ("12.5%", "13.5%"),
        ("9" * 5000, "1" + "0" * 5000),
        ("(A)", None),
        ("", None),
    ],
)
def test_the_next_number(target, next_target):
    assert increased(target) == next_target


def test_numbers_are_compared_as_numbers():
    assert same("51", "51.0")
    assert same("$1,000", "1000")
    assert same("Yes ", "yes")
    assert not same("1", "l")
    assert not same("nan", "inf")


def test_options_have_the_target_in_the_middle():
    for target in ("0", "100", "7.5", "Z", "red"):
        listed = options_of(target, ["red", "blue", "green"]).split(", ")
        assert listed.index(target) == (len(listed) - 1) // 2
        assert listed[-1] != target
    assert options_of("red", ["red", "Red"]) is None
    assert options_of("", ["red"]) is None


def test_a_wrong_answer_has_the_form_of_the_right_one_and_another_value():
    golds = [row.solution for row in ROWS[:3]] + ["(B)", None]
    first, second, third, letter, poem = samples(ROWS, golds)
    # 51.0 is no other number than 51
    assert (first.wrong, first.next_number) == ("76 - 25 = 1200", "76 - 25 = 52")
    assert (second.wrong, second.next_number) == ("50 + 1 = 1200", "50 + 1 = 52.0")
    assert third.next_number == "There are 1201."
    assert (letter.wrong, letter.next_number) == ("(51)", None)
    assert poem == Sample(ROWS[4])
    assert replaced("no mention", "51", "52") is None


def test_rows_without_targets_take_answers_of_other_rows_as_wrong():
    rows = [PromptRow(f"p{i}", "", f"poem {i // 2}") for i in range(3)]
    assert [s.wrong for s in samples(rows, [r.solution for r in rows])] == [
        "poem 1",
        "poem 1",
        "poem 0",
    ]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_answers_that_do_not_depend_on_the_row_hold_no_number_that_may_be_a_target(kind):
    """A number in a hostile text would be the right answer to some row."""
    text = kind.write(Sample(PromptRow("p", "")))
    if text is not None and kind.most is None:
        assert kind.right is False
        assert not any(character.isdigit() for character in text)


def test_names_of_kinds_and_forms_are_different():
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert KINDS[0] is GOLD
    assert all(form.count("{}") == 1 for form in FORMS.values())
