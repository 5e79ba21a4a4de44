"""`ReasoningGymAnswer`: a stand-in for the package shows which answers reach the verifier."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Completion, ReasoningGymAnswer
from lightning_mpo.rewards.process import is_of_user
from lightning_mpo.rewards.reasoning_gym import COLUMN, cached_task


class Task:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def score_answer(self, answer: str, entry: dict) -> float:
        return float(int(answer) == self.factor * int(entry["answer"]))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    package.create_dataset = lambda name, factor=1: Task(factor)
    factory.DATASETS = {"task": None}
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    cached_task.cache_clear()
    yield
    cached_task.cache_clear()


def done(text: str, finished: bool = True, options: dict | None = None, **fields) -> Completion:
    column = {"task": "task", "options": options or {}, "entry": {"answer": "12"}}
    return Completion("p", text, "12", 3, finished, {COLUMN: column}, **fields)


@pytest.mark.parametrize(
    ("completion", "score", "answered"),
    [
        (done("<answer>12</answer>"), 1.0, True),
        (done("It is <answer>1</answer>, no, <answer> 12 </answer>."), 1.0, True),
        (done("12"), 1.0, True),
        (done("<think>12</think><answer>12</answer>"), 1.0, True),
        (done("<answer>13</answer>"), 0.0, True),
        (done("<answer>twelve</answer>"), 0.0, True),
        (done("<answer>12</answer>", finished=False), 0.0, True),
        (done("<answer></answer>"), 0.0, False),
        (done("12", thinking=True), 0.0, False),
        (done("24", options={"factor": 2}), 1.0, True),
        (done("12", options={"factor": 2}), 0.0, True),
    ],
)
def test_the_verifier_judges_the_answer(completion, score, answered):
    assert ReasoningGymAnswer().score([completion]) == [score]
    assert ReasoningGymAnswer().answered([completion]) == [answered]


def test_other_data_is_refused():
    ReasoningGymAnswer().check_columns([COLUMN])
    with pytest.raises(UserError, match="checks answers to the data `ReasoningGym` alone"):
        ReasoningGymAnswer().check_columns(["nums"])


def test_verifiers_run_in_the_helper_process():
    assert is_of_user(ReasoningGymAnswer())
