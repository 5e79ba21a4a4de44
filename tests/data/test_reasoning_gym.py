"""`ReasoningGym`: problems of a task, which their own verifier accepts."""

from __future__ import annotations

import sys

import pytest

from lightning_mpo.data import ReasoningGym
from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Completion, ReasoningGymAnswer

COUNTS = {"train_problems": 30, "held_out_problems": 10}


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'lightning-mpo\[reasoning-gym\]'"):
        ReasoningGym("chain_sum").setup("fit")


@pytest.mark.parametrize("task", ["chain_sum", "letter_counting", "countdown"])
def test_problems_are_a_function_of_their_seed_and_their_answers_are_right(task):
    pytest.importorskip("reasoning_gym")
    data = ReasoningGym(task, **COUNTS)
    train, held_out = data.splits.train, data.splits.validation
    assert len(train) == 30
    assert 5 <= len(held_out) <= 10
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert ReasoningGym(task, **COUNTS).splits == data.splits
    assert ReasoningGym(task, problem_seed=1, **COUNTS).splits != data.splits
    done = [
        Completion(row.prompt, row.solution, row.target, 9, True, row.extra)
        for row in [*train, *held_out]
        if row.solution
    ]
    assert done or task == "countdown"
    assert all(score > 0.9 for score in ReasoningGymAnswer().score(done))


def test_options_change_the_problems():
    pytest.importorskip("reasoning_gym")
    short, long = (
        ReasoningGym("chain_sum", {"min_terms": n, "max_terms": n}, **COUNTS).splits.train
        for n in (2, 6)
    )
    assert max(len(row.prompt) for row in short) < min(len(row.prompt) for row in long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chain_sums",), "reasoning-gym has no task 'chain_sums'; did you mean 'chain_sum'"),
        (("chain_sum", {"terms": 3}), "`ReasoningGym.options` of 'chain_sum' are not valid"),
        (("chain_sum", {"min_terms": 9, "max_terms": 3}), "`ReasoningGym.options` of 'chain_sum'"),
    ],
)
def test_tasks_and_options_that_are_none_are_refused(arguments, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError) as caught:
        ReasoningGym(*arguments).setup("fit")
    assert message in str(caught.value)
