"""`CountdownAnswer`: exact values of expressions that are parsed and never run."""

from __future__ import annotations

import warnings

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Completion, CountdownAnswer
from lightning_mpo.rewards.countdown import is_countdown, parse, right_expressions
from lightning_mpo.rewards.trying import right_forms
from lightning_mpo.types import PromptRow


def done(text: str, target: str = "24", nums: object = (4, 7, 8, 4), **fields) -> Completion:
    row = {"nums": list(nums) if isinstance(nums, tuple) else nums}
    return Completion("p", text, target, 5, fields.pop("finished", True), row, **fields)


RIGHT = (
    "(8-4)*7-4",
    " ( 8 - 4 ) * 7 - 4 ",
    "(8-4)*7-4=24",
    "(8-4)*7-4 = 24",
    "(8−4)×7–4",
    "-4+7*(8-4)",
    "First 8-4 is 4.\nThen:\n(8-4)*7-4",
    "I try <answer>4+4</answer> and then <answer>(8-4)*7-4</answer>, which is right.",
    "<think>4*4+8</think>(8-4)*7-4",
)
WRONG = (
    "8*(7-4)",  # 24, and one number is missing
    "8*(7-4)+4-4",  # 4 three times
    "(8-4)*7-4=25",
    "(8-4)*7-4=4*6",
    "(8-4)*7+4",
    "4+7+8+4",
    "8/(4-4)*7",
    "24",
    "",
)
NO_EXPRESSION = (
    "(8-4)*7-4.",
    "x = (8-4)*7-4",
    "4**7//8%4",
    "8-4*7-4)",
    "(8-4)(7-4)",
    "8 4 7 4",
    "08+4+7+4",
    "2_4",
    "8.0*(7-4)",
    "max(8,4,7,4)",
    "__import__('os').system('true')",
    "٤+٧",
    "(" * 200 + "4" + ")" * 199,
    "(" * 150 + "4" + ")" * 150,
    "-" * 399 + "4",
    "4+" * 10_000 + "4",
    "9" * 5000,
    "\n",
)


@pytest.mark.parametrize("text", RIGHT)
def test_right(text):
    assert CountdownAnswer().score([done(text)]) == [1.0]
    assert CountdownAnswer().answered([done(text)]) == [True]


@pytest.mark.parametrize("text", [*WRONG, *NO_EXPRESSION])
def test_wrong(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CountdownAnswer().score([done(text)]) == [0.0]
        assert CountdownAnswer(all_numbers=False).answered([done(text)]) in ([True], [False])


@pytest.mark.parametrize("text", ["", "no", "**", "1//1", "1;1", "lambda: 1", "[1]", "1,1", "1<1"])
def test_other_texts_are_no_answer(text):
    assert parse(text) is None
    assert CountdownAnswer().answered([done(text)]) == [False]


def test_values_are_exact():
    assert CountdownAnswer().score([done("8/(3-8/3)", nums=(8, 3, 8, 3))]) == [1.0]
    tenths = ("+".join(["1/10"] * 10) + "-1+9*1", (*(1, 10) * 10, 1, 9, 1))
    assert CountdownAnswer().score([done(tenths[0], "9", tenths[1])]) == [1.0]


def test_numbers_may_be_left_out_by_option():
    reward = CountdownAnswer(all_numbers=False)
    assert reward.score([done("8*(7-4)"), done("(8-4)*7-4"), done("8*7-8*4")]) == [1.0, 1.0, 0.0]


def test_a_response_that_was_cut_off_is_wrong():
    assert CountdownAnswer().score([done("(8-4)*7-4", finished=False)]) == [0.0]


def test_open_thoughts_hold_no_answer():
    completion = done("(8-4)*7-4", thinking=True)
    assert CountdownAnswer().score([completion]) == [0.0]
    assert CountdownAnswer().answered([completion]) == [False]


@pytest.mark.parametrize(
    ("target", "nums"),
    [("many", (1, 2)), ("", (1, 2)), ("1e999999999", (1, 2)), ("3", None), ("3", "1,2")],
)
def test_rows_that_cannot_be_read_are_not_judged(target, nums):
    with pytest.warns(UserWarning, match="cannot read the target") as caught:
        assert CountdownAnswer().score([done("1+2", target, nums)] * 2) == [None, None]
    assert len(caught) == 1


def test_numbers_as_tables_write_them_are_read():
    assert CountdownAnswer().score([done("1+2", "3.0", (1.0, "2"))]) == [1.0]


def test_a_missing_column_is_refused_before_training():
    CountdownAnswer().check_columns(["nums"])
    with pytest.raises(UserError, match="needs the column 'nums' with the given numbers, and the"):
        CountdownAnswer().check_columns(["numbers"])
    with pytest.raises(UserError, match=r"`CountdownAnswer.numbers` must name a column"):
        CountdownAnswer(numbers="")


@pytest.mark.parametrize(
    ("solution", "forms"),
    [
        ("(8-4)*7-4", ["(8-4)*7-4", "<answer>(8-4)*7-4</answer>"]),
        ("8*7-4-4", []),
        ("8/(4-4)+7", []),
    ],
)
def test_the_right_answer_to_a_row_is_its_solution_if_it_reaches_the_target(solution, forms):
    row = PromptRow("4,7,8,4;24=", "24", solution, {"nums": [4, 7, 8, 4]})
    assert is_countdown(row)
    assert list(right_expressions(row).values()) == forms
    assert list(right_forms(row).values()) == forms


def test_rows_with_another_answer_are_no_countdown():
    assert not is_countdown(PromptRow("1+1=", "2", "1+1"))
    assert not is_countdown(PromptRow("1, 2", "3", "It is 3.", {"nums": [1, 2]}))
    assert not is_countdown(PromptRow("1, 2", "3", None, {"nums": [1, 2]}))
