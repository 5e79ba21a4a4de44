"""Generated problems: distinct, on one side each, and a function of their seed alone."""

from __future__ import annotations

import pytest

from lightning_mpo.data.arithmetic import Arithmetic, ForgetfulMultiplication, Multiplication
from lightning_mpo.data.countdown import Countdown
from lightning_mpo.data.generated import GeneratedProblems
from lightning_mpo.data.spans import Spans
from lightning_mpo.data.stars import StarGraphs
from lightning_mpo.data.tails import Tails
from lightning_mpo.errors import UserError
from lightning_mpo.seeding import is_held_out

FEW = {"train_problems": 200, "held_out_problems": 20}
MEMBERS: dict[type[GeneratedProblems], list[dict[str, object]]] = {
    Arithmetic: [{"digits": 2}, {"digits": 2, "careless_share": 0.5}],
    Multiplication: [{"digits": 2}, {"digits": 2, "careless_share": 0.5}],
    ForgetfulMultiplication: [
        {"digits": 3, "smallest_digit": 4},
        {"digits": 3, "smallest_digit": 4, "careless_share": 0.5},
    ],
    Countdown: [{}, {"careless_share": 0.5}],
    Spans: [{}, {"careless_share": 0.0}],
    Tails: [{}, {"tail": 0.5}, {"vocabulary": 100}, {"careless_share": 0.5}],
    StarGraphs: [{}, {"careless_share": 0.0}],
}
"""Each class, with options that change only demonstrations."""


@pytest.fixture(params=MEMBERS, ids=lambda owner: owner.__name__)
def owner(request):
    return request.param


def make(owner, **options):
    return owner(**(FEW | MEMBERS[owner][0] | options))


def prompts(data):
    return [[row.prompt for row in rows] for rows in (data.splits.train, data.splits.validation)]


def test_problems_are_distinct_and_as_many_as_the_options_say(owner):
    train, held_out = prompts(make(owner))
    assert (len(train), len(held_out)) == (200, 20)
    assert len({*train, *held_out}) == 220


def test_a_hash_of_the_prompt_alone_holds_problems_out(owner):
    for options in ({}, {"problem_seed": 1}, {"seed": 3}):
        train, held_out = prompts(make(owner, **options))
        assert all(is_held_out(prompt, 0.1) for prompt in held_out)
        assert not any(is_held_out(prompt, 0.1) for prompt in train)


def test_rows_are_a_function_of_their_seed(owner):
    data = make(owner)
    assert data.splits == make(owner).splits == make(owner, seed=5).splits
    assert data.splits != make(owner, problem_seed=1).splits
    assert all(row.solution for row in data.splits.train)


def test_options_of_demonstrations_change_no_problem_and_no_target(owner):
    first, *others = (
        [(row.prompt, row.target) for row in make(owner, **options).splits.train]
        for options in MEMBERS[owner]
    )
    assert others
    assert all(other == first for other in others)


@pytest.mark.parametrize("option", ["train_problems", "held_out_problems"])
def test_too_few_problems_end_in_one_line(owner, option):
    few = {StarGraphs: {"alphabet": 7}, Spans: {"decisions": 7}}
    with pytest.raises(UserError, match=rf"`{owner.__name__}\.\w+` = \d+ gives [\d,]+ problems"):
        make(owner, **few.get(owner, {}), **{option: 10**7})
