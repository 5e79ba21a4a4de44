"""`Countdown`: each problem has an answer, and careless demonstrations reach the target by chance only."""

from __future__ import annotations

import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from lightning_mpo.data.countdown import Countdown, random_expression
from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.rewards import Completion, CountdownAnswer

ALPHABET = "0123456789+-*/(),;="


def problems(**options) -> Countdown:
    return Countdown(**({"train_problems": 300, "held_out_problems": 30} | options))


def value(expression: str) -> Fraction:
    """Python's own reading of an expression, in fractions."""
    return eval(re.sub(r"(\d+)", r"Fraction(\1)", expression))


@pytest.mark.parametrize("numbers", [2, 3, 6])
@pytest.mark.parametrize("largest", [60, 100])
def test_the_demonstration_uses_each_number_once_and_reaches_the_target(numbers, largest):
    data = problems(numbers=numbers, largest=largest, largest_target=largest + 10)
    for row in [*data.splits.train, *data.splits.validation]:
        given, target = row.prompt.removesuffix("=").split(";")
        assert [int(number) for number in given.split(",")] == row.extra["nums"]
        assert target == row.target
        assert 1 <= int(target) <= largest + 10
        assert Counter(re.findall(r"\d+", row.solution)) == Counter(given.split(","))
        assert value(row.solution) == int(target)


def test_all_operators_and_brackets_are_drawn_and_intermediate_results_are_positive():
    text = "".join(row.solution for row in problems(numbers=5).splits.train)
    assert set(text) >= set("+-*/()")
    for seed in range(300):
        number, expression = random_expression((4, 6, 2, 9), random.Random(seed))
        assert number >= 1
        assert value(expression) == number, expression


def test_careless_demonstrations_use_the_numbers_and_are_mostly_wrong():
    careful, careless = (problems(careless_share=share).splits.train for share in (0.0, 1.0))
    right = 0
    for row, other in zip(careful, careless, strict=True):
        assert (row.prompt, row.target, row.extra) == (other.prompt, other.target, other.extra)
        assert Counter(re.findall(r"\d+", other.solution)) == Counter(map(str, row.extra["nums"]))
        right += value(other.solution) == int(row.target)
    assert right < 60


def test_the_prompt_is_an_option():
    row = problems(prompt="Use {numbers} to reach {target}: \\boxed{}").splits.train[0]
    assert re.fullmatch(r"Use \d+,\d+,\d+,\d+ to reach \d+: \\boxed\{\}", row.prompt)


def test_the_alphabet_of_the_tiny_policy_suffices():
    data, policy = problems(careless_share=0.5), TinyPolicy(characters=ALPHABET)
    data.connect(policy.tokenizer)
    data.check_solutions()
    done = [
        Completion(row.prompt, row.solution, row.target, 1, True, row.extra)
        for row in problems().splits.train
    ]
    assert CountdownAnswer().score(done) == [1.0] * 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numbers": 1}, "`Countdown.numbers` must be at least 2"),
        ({"numbers": 7}, "`Countdown.numbers` must be at most 6"),
        ({"largest_target": 19}, "`Countdown.largest_target` must be at least 20, got 19"),
        ({"numbers": 2}, "`Countdown.largest` = 20 gives 400 problems, and `held_out_share`"),
        ({"prompt": "{numbers}="}, "must contain {numbers} and {target}, got '{numbers}='"),
        ({"careless_share": 2}, "careless_share"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        problems(**options)
