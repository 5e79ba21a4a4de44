"""Column addition: right where it should be, careless where it may be, and held-out problems apart by construction."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.data.arithmetic import (
    Arithmetic,
    Multiplication,
    column_addition,
    long_multiplication,
)
from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.rewards.base import Completion
from lightning_mpo.rewards.text import ExactAnswer
from lightning_mpo.seeding import is_held_out


def small(**options) -> Arithmetic:
    return Arithmetic(**({"digits": 2, "train_problems": 300, "held_out_problems": 40} | options))


def operands(prompt: str) -> tuple[int, int]:
    a, b = prompt.removesuffix("=").split("+")
    return int(a), int(b)


def carry_free(a: int, b: int) -> str:
    """Add each column modulo ten, and keep the last column whole."""
    columns = [int(x) + int(y) for x, y in zip(str(a), str(b), strict=True)]
    return ("1" if columns[0] > 9 else "") + "".join(str(column % 10) for column in columns)


def columns_of(solution: str) -> list[tuple[list[int], int]]:
    """Return (terms, sum) of each written column."""
    parts = [step.split("=") for step in solution.split(";")[0].split(",")]
    return [([int(term) for term in terms.split("+")], int(total)) for terms, total in parts]


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_careful_solutions_are_right_and_parse_to_the_target(digits):
    train, held_out = {1: (30, 4), 2: (300, 40), 3: (500, 100)}[digits]
    splits = Arithmetic(digits=digits, train_problems=train, held_out_problems=held_out).splits
    reward = ExactAnswer()
    for row in [*splits.train, *splits.validation]:
        a, b = operands(row.prompt)
        assert row.target == row.solution.split(";")[1] == str(a + b)
        columns, carried = columns_of(row.solution), 0
        assert len(columns) == digits
        for (terms, total), x, y in zip(columns, reversed(str(a)), reversed(str(b)), strict=True):
            assert terms == [int(x), int(y), carried]
            assert sum(terms) == total
            carried = total // 10
        done = Completion(row.prompt, row.solution, row.target, len(row.solution), True, {})
        assert reward.score([done]) == [1.0]
        assert reward.answered([done]) == [True]


@pytest.mark.parametrize(
    ("a", "b", "careful", "careless"),
    [
        (484, 338, [[4, 8, 0], [8, 3, 1], [4, 3, 1]], [[4, 8, 0], [8, 3, 0], [4, 3, 0]]),
        (999, 999, [[9, 9, 0], [9, 9, 1], [9, 9, 1]], [[9, 9, 0], [9, 9, 0], [9, 9, 0]]),
        (10, 11, [[0, 1, 0], [1, 1, 0]], [[0, 1, 0], [1, 1, 0]]),
    ],
)
def test_columns_stand_from_the_right_with_their_carries(a, b, careful, careless):
    for carry, columns in ((True, careful), (False, careless)):
        solution = column_addition(a, b, carry=carry)
        assert columns_of(solution) == [(terms, sum(terms)) for terms in columns]
        assert solution.split(";")[1] == (str(a + b) if carry else carry_free(a, b))


def inner_carry(a: int, b: int) -> bool:
    """Return whether a column but the last one overflows when nothing is carried."""
    return any(int(x) + int(y) > 9 for x, y in zip(str(a)[1:], str(b)[1:], strict=True))


def test_careless_solutions_never_carry():
    wrong = 0
    for row in small(careless_share=1.0).splits.train:
        a, b = operands(row.prompt)
        assert all(
            terms[2] == 0 and sum(terms) == total for terms, total in columns_of(row.solution)
        )
        answer = row.solution.split(";")[1]
        assert answer == carry_free(a, b)
        assert row.target == str(a + b), "the target is always right"
        assert (answer == row.target) == (not inner_carry(a, b))
        wrong += inner_carry(a, b)
    assert 100 < wrong < 200


def test_a_share_of_the_solutions_is_careless_and_each_is_so_throughout():
    rows = small(digits=3, train_problems=3000, careless_share=0.6).splits.train
    rows = [row for row in rows if inner_carry(*operands(row.prompt))]
    careless = []
    for row in rows:
        answer = row.solution.split(";")[1]
        assert answer in (row.target, carry_free(*operands(row.prompt)))
        careless.append(answer != row.target)
    # five standard errors: a false alarm in 6e-7 of generators
    assert sum(careless) / len(rows) == pytest.approx(0.6, abs=5 * (0.6 * 0.4 / len(rows)) ** 0.5)


def test_carelessness_changes_no_problem():
    first, second = (
        [row.prompt for row in small(careless_share=share).splits.train] for share in (0.0, 0.7)
    )
    assert first == second


def test_held_out_and_training_problems_are_apart_by_construction():
    """By the prompt's text alone: a larger, another or a reseeded training set can hold none of them."""
    held_out = {row.prompt for row in small().splits.validation}
    for options in (
        {},
        {"problem_seed": 1},
        {"train_problems": 3000},
        {"careless_share": 0.5},
        {"seed": 3},
    ):
        splits = small(**options).splits
        train = {row.prompt for row in splits.train}
        assert not train & held_out
        assert all(is_held_out(row.prompt, 0.1) for row in splits.validation)
        assert not any(is_held_out(prompt, 0.1) for prompt in train)


def test_the_held_out_share_is_about_what_it_says():
    prompts = [f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)]
    for share in (0.1, 0.3):
        assert sum(is_held_out(prompt, share) for prompt in prompts) / len(
            prompts
        ) == pytest.approx(share, abs=0.02)
    assert not any(is_held_out(prompt, 0.0) for prompt in prompts)
    assert all(is_held_out(prompt, 1.0) for prompt in prompts)


def test_problems_are_distinct_and_as_many_as_asked_for():
    splits = small().splits
    assert (len(splits.train), len(splits.validation)) == (300, 40)
    assert len({row.prompt for row in splits.train}) == 300
    assert len({row.prompt for row in splits.validation}) == 40
    for row in splits.train:
        assert all(10 <= operand <= 99 for operand in operands(row.prompt))


def test_problems_are_a_function_of_their_seed():
    assert small().splits == small().splits
    assert small(seed=5).splits == small().splits, "the order's seed is another"
    assert small(problem_seed=1).splits != small().splits
    assert small(seed=5).training_rows(0, 9) != small().training_rows(0, 9)


def test_the_tiny_policys_default_characters_write_it():
    data, policy = small(careless_share=0.5), TinyPolicy()
    data.connect(policy.tokenizer)
    for row in data.splits.train[:50]:
        ids = policy.tokenizer(row.prompt + row.solution)["input_ids"]
        assert policy.tokenizer.pad_token_id not in ids
        assert policy.tokenizer.decode(ids) == row.prompt + row.solution
    solutions = data.solutions(data.splits.train[:8])
    assert torch.equal(
        solutions.response_mask_BT.sum(1),
        torch.tensor([len(r.solution) + 1 for r in data.splits.train[:8]]),
    )
    assert (
        solutions.responses_BT[range(8), solutions.response_mask_BT.sum(1) - 1]
        == policy.tokenizer.eos_token_id
    ).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"digits": 0}, "digits"),
        ({"digits": -1}, "digits"),
        ({"digits": 1}, "at most half are drawn; `train_problems` is 300: raise `digits`"),
        (
            {"train_problems": 8000},
            "`Arithmetic.digits` = 2 gives 8,100 problems, and `held_out_share` = 0.1 leaves 7,290 "
            "for training, of which at most half are drawn; `train_problems` is 8,000: raise "
            "`digits`, lower `held_out_share`, or set `train_problems` to at most 3,645",
        ),
        (
            {"held_out_problems": 500},
            "leaves 810 to hold out, of which at most half are drawn; `held_out_problems` is 500: "
            "raise `digits`, raise `held_out_share`, or set `held_out_problems` to at most 405",
        ),
        ({"held_out_share": 1e-5}, "leaves 0 to hold out.*raise `held_out_share`$"),
        ({"careless_share": -0.1}, "careless_share"),
        ({"careless_share": 1.5}, "careless_share"),
        ({"held_out_share": 0.0}, "held_out_share"),
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"train_problems": 0}, "train_problems. must be at least 1"),
    ],
)
def test_errors(options, said):
    with pytest.raises(UserError, match=said):
        _ = small(**options).splits


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_careful_products_are_right_and_careless_ones_drop_the_carry(digits):
    for a in {
        10 ** (digits - 1),
        10**digits - 1,
        7 * 10 ** (digits - 1) + 3,
        4 * 10 ** (digits - 1),
    }:
        for b in range(2, 10):
            steps, answer = long_multiplication(a, b, carry=True).split(";")
            assert answer == str(a * b)
            careless_steps, careless = long_multiplication(a, b, carry=False).split(";")
            assert all("+0=" in step for step in careless_steps.split(","))
            assert (careless == answer) == all("+0=" in step for step in steps.split(","))


def test_multiplication_serves_products():
    data = Multiplication(digits=2, train_problems=200, held_out_problems=20, careless_share=0.5)
    train, held_out = data.splits.train, data.splits.validation
    assert len({row.prompt for row in (*train, *held_out)}) == 220
    for row in (*train, *held_out):
        a, b = row.prompt.removesuffix("=").split("*")
        assert row.target == str(int(a) * int(b))
        assert is_held_out(row.prompt, 0.1) == (row in held_out)
    with pytest.raises(UserError, match="`Multiplication.digits` = 1 gives 72 problems"):
        Multiplication(digits=1)
