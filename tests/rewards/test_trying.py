"""Rewards on answers: numbers, failures, the sum of a run, and the form of the right answer."""

from __future__ import annotations

import time

import pytest

from lightning_mpo.rewards import ExactAnswer, Finished, FunctionReward, TokenReward
from lightning_mpo.rewards.answers import FEW, GOLD, Kind, Sample
from lightning_mpo.rewards.process import RewardCaller
from lightning_mpo.rewards.trying import GIVEN, choose_golds, right_forms
from lightning_mpo.types import PromptRow
from tests.support.reward_trials import trial

ROWS = [PromptRow(f"{n}+{n}=", str(2 * n), f"{n}+{n}={2 * n}") for n in range(1, 5)]
NOTHING = PromptRow("Hello", "")


def gold_of(rows, form=";{}") -> list[Sample]:
    return [Sample(row, form.format(row.target)) for row in rows]


def test_numbers_of_each_reward_and_of_the_sum():
    rewards = [ExactAnswer(weight=2.0), Finished(weight=0.5)]
    outcome = trial(*rewards).outcome(GOLD, gold_of(ROWS))
    assert outcome.parts["exact_answer"].scores == [1.0] * 4
    assert outcome.sums == [2.5] * 4
    assert outcome.right == [True] * 4
    assert outcome.by_row == dict.fromkeys(range(4), 2.5)
    cut = Kind("cut", False, lambda sample: sample.gold, finished=False, most=FEW)
    outcome = trial(*rewards).outcome(cut, gold_of(ROWS))
    assert outcome.sums == [0.0] * FEW
    assert outcome.right == [False] * FEW
    assert [c.tokens for c in outcome.answers.values()] == [1] * FEW


def test_a_kind_without_answers_has_no_outcome():
    assert trial(ExactAnswer()).outcome(GOLD, [Sample(row) for row in ROWS]) is None


def test_a_reward_that_abstains_leaves_rows_undecided():
    outcome = trial(ExactAnswer()).outcome(GOLD, [Sample(NOTHING, "Hi")])
    assert (outcome.sums, outcome.right) == ([None], [None])


def raises(completions):
    raise KeyError("no such answer")


class NoTokens(TokenReward):
    def token_scores(self, completions):
        return [[] for _ in completions]


@pytest.mark.parametrize("reward", [FunctionReward(raises), NoTokens()])
def test_a_reward_that_fails_leaves_no_sum_and_other_rewards_stay(reward):
    outcome = trial(ExactAnswer(), reward).outcome(GOLD, gold_of(ROWS))
    assert outcome.parts["exact_answer"].scores == [1.0] * 4
    assert outcome.parts[reward.name].scores == [None] * 4
    assert all(outcome.parts[reward.name].errors)
    assert outcome.sums == outcome.right == [None] * 4


def hangs(completions):
    if any("hang" in text for text in completions):
        time.sleep(100)
    return [1.0] * len(completions)


@pytest.mark.slow
def test_a_reward_that_hangs_costs_the_answers_of_one_kind():
    reward = FunctionReward(hangs)
    caller = RewardCaller([reward], 3.0, process=True)
    try:
        tried = trial(reward, call=caller)
        kinds = [Kind(name, None, lambda sample, text=name: text) for name in ("a", "hang", "b")]
        first, second, third = (tried.outcome(kind, [Sample(NOTHING)] * 2) for kind in kinds)
    finally:
        caller.close()
    assert first.sums == third.sums == [1.0, 1.0]
    assert second.sums == [None, None]
    assert " took more than " in second.parts["hangs"].errors[0]


def test_the_right_answer_has_the_form_that_is_judged_right():
    rows = [*ROWS, PromptRow("9+9=", "18", "9+9=8"), NOTHING]
    forms = trial(ExactAnswer("#### ")).forms(rows)
    assert choose_golds(rows, forms) == [*["hashes"] * 5, None]
    # the solution where it has as much reward, and only if it holds the target
    forms = trial(ExactAnswer("=")).forms(rows)
    assert choose_golds(rows, forms)[:4] == ["solution"] * 4
    assert sorted(forms["solution"].answers) == [0, 1, 2, 3]


def test_a_form_of_the_user_comes_first():
    forms = trial(ExactAnswer("=")).forms(ROWS, "so = {}")
    assert forms[GIVEN].sums == [1.0] * 4
    assert choose_golds(ROWS, forms) == [GIVEN] * 4
    assert right_forms(ROWS[0], "so = {}")[GIVEN] == "so = 2"
