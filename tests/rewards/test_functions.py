"""Functions as rewards: what they are given, what they may return, and how they are named."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import (
    Completion,
    ExactAnswer,
    FunctionReward,
    Reward,
    RewardError,
    score_all,
)
from lightning_mpo.rewards.importing import load_object
from lightning_mpo.rewards.resolving import RewardPath, as_rewards

BATCH = [
    Completion(f"p{i}", f"t{i}", f"{i}", 2, True, {"answer": 10 * i}, token_ids=(7, i))
    for i in range(3)
]


def scores(function: Any) -> list[float | None]:
    return score_all(as_rewards(function), BATCH).rewards_B.tolist()


def trl(completions, **kwargs):
    assert completions == ["t0", "t1", "t2"]
    assert kwargs["prompts"] == kwargs["prompt"] == ["p0", "p1", "p2"]
    assert kwargs["completion_ids"] == [[7, 0], [7, 1], [7, 2]]
    assert kwargs["target"] == ["0", "1", "2"]
    return [float(answer) for answer in kwargs["answer"]]


def only_names(completions, answer):
    return [float(a) for a in answer]


def defaults(prompts, answer=(), scale=2.0):
    return [scale * a for a in answer]


def keyword_only(*, completion_ids):
    return [ids[1] * 10.0 for ids in completion_ids]


def positional(completions, /, answer):
    return [float(a) for a in answer]


async def slow(answer):
    await asyncio.sleep(0)
    return list(answer)


class Called:
    def __call__(self, answer):
        return answer


@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (trl, 10), (only_names, 10), (defaults, 20), (keyword_only, 10), (positional, 10), (slow, 10), (Called(), 10),
        (functools.partial(defaults, scale=3.0), 30), (lambda answer: answer, 10),
    ],
)  # fmt: skip
def test_a_function_gets_the_columns_that_it_takes(function, factor) -> None:
    assert scores(function) == [0, factor, 2 * factor]


@pytest.mark.parametrize(
    "value",
    [
        np.arange(3.0), torch.arange(3.0, requires_grad=True), (0, 1, 2), range(3), np.array([0, None, 2], dtype=object),
        [False, np.float32(1), torch.tensor(2.0)],
    ],
    ids=repr,
)  # fmt: skip
def test_what_holds_one_number_a_completion_is_taken(value) -> None:
    assert scores(lambda completions: value)[2] == 2


def test_a_generator_is_taken_and_an_endless_one_refused() -> None:
    def endless(completions):
        while True:
            yield 1.0

    assert scores(lambda completions: (len(c) for c in completions)) == [2, 2, 2]
    with pytest.raises(
        RewardError, match=r"`endless` must return one number per completion \(3\), got more"
    ):
        scores(endless)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["0.5"] * 3, "returned '0.5' for completion 0"),
        ([1j] * 3, "returned 1j"),
        ([10**400] * 3, "float32 holds numbers up to 3.4e38"),
        ([1e39] * 3, "float32 holds numbers up to 3.4e38"),
        ([2**53 + 1] * 3, "a float does not hold all digits of this integer"),
        ({1.0, 2.0, 3.0}, "must return a list of 3 numbers, got set"),
        (torch.ones(()), "must return a list of 3 numbers, got Tensor"),
    ],
)
def test_what_is_no_number_is_refused(value, message) -> None:
    with pytest.raises(RewardError, match=f"reward `<lambda>` {message}|{message}"):
        scores(lambda completions: value)


def test_a_sum_beyond_float32_is_refused_and_names_the_weights() -> None:
    with pytest.raises(
        RewardError, match=r"is 1e\+39, more than float32 holds; lower the weights \(f 1e\+09\)"
    ):
        score_all([FunctionReward(_f, weight=1e9)], BATCH)


def _f(completions):
    return [1e30] * len(completions)


_f.__name__ = "f"


def test_a_name_that_nothing_gives_is_refused() -> None:
    reward = FunctionReward(lambda completions, nosuch: [])
    with pytest.raises(
        RewardError, match="takes `nosuch`, which it is not given; .* `answer`, or `\\*\\*kwargs`"
    ):
        reward.check_columns(["answer"])
    FunctionReward(only_names).check_columns(["answer"])


def test_rewards_are_listed() -> None:
    assert [type(r) for r in as_rewards([ExactAnswer(), trl])] == [ExactAnswer, FunctionReward]
    assert type(as_rewards(ExactAnswer())[0]) is ExactAnswer
    assert as_rewards(trl)[0].name == "trl"
    for wrong, message in [
        (5, "must be a list of rewards, got int"), ([5], "holds 5, which is neither"), (ExactAnswer, r"write `ExactAnswer\(\)`"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            as_rewards(wrong)


def test_a_reward_without_super_has_the_weight_1() -> None:
    class Mine(Reward):
        def __init__(self, scale):
            self.scale = scale

        def score(self, completions):
            return [self.scale] * len(completions)

    assert score_all([Mine(2.0)], BATCH).rewards_B.tolist() == [2, 2, 2]


def test_functions_and_classes_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from lightning_mpo.rewards import Reward\n"
        "def f(completions): return [1.0] * len(completions)\n"
        "class Two(Reward):\n"
        "    def __init__(self, scale=2.0): self.scale = scale\n"
        "    def score(self, completions): return [self.scale] * len(completions)\n"
    )
    assert scores(RewardPath(f"{file}:f")) == [1, 1, 1]
    assert scores(RewardPath({"class_path": f"{file}:Two", "init_args": {"scale": 3.0}})) == [
        3,
        3,
        3,
    ]
    weighted = FunctionReward(f"{file}:f", weight=0.5, accuracy=True)
    assert score_all([weighted], BATCH).rewards_B.tolist() == [0.5] * 3
    assert score_all([weighted], BATCH).correct_B.all()
    for value, message in [
        (f"{file}:g", "has no `g`; it has .*f"),
        (f"{file}.py:f", "there is no file"),
        (
            {"class_path": f"{file}:f", "init_args": {"a": 1}},
            "is a function; write {class_path: FunctionReward",
        ),
        ({"class_path": f"{file}:Two", "init_args": {"a": 1}}, "cannot be built: TypeError"),
        ("nosuchmodule.f", "^no module `nosuchmodule` for `nosuchmodule.f`; looked in "),
        ("nodot", "must be an import path"),
    ]:
        with pytest.raises(UserError, match=message):
            RewardPath(value)


def test_a_module_that_exits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "exits.py").write_text("import sys; sys.exit(0)")
    with pytest.raises(UserError, match="cannot be imported: SystemExit: 0"):
        load_object(f"{tmp_path}/exits.py:f")


def test_what_belongs_to_the_batch_is_not_taken_from_columns() -> None:
    row = {
        "completions": "column",
        "prompts": "column",
        "completion_ids": "column",
        "target": "column",
    }
    seen: dict[str, Any] = {}
    FunctionReward(
        lambda completions, **columns: seen.update(columns, completions=completions) or [0.0]
    ).score([Completion("p", "t", "x", 1, True, row, token_ids=(7,))])
    assert (seen["completions"], seen["prompts"], seen["completion_ids"]) == (["t"], ["p"], [[7]])
    assert seen["target"] == ["column"]


def test_a_column_that_a_batch_lacks_is_named() -> None:
    with pytest.raises(RewardError, match="takes `answer`, which it is not given"):
        FunctionReward(only_names).score([Completion("p", "t", "x", 1, True, {})])


def test_a_file_that_failed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "again.py"
    file.write_text("1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_object(f"{file}:f")
    file.write_text("def f(completions): return [2.0]\n")
    assert load_object(f"{file}:f")(["a"]) == [2.0]


def test_a_file_is_also_looked_for_where_modules_are(tmp_path, monkeypatch):
    (tmp_path / "lengths.py").write_text(
        "def length(completions):\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(UserError, match="there is no file"):
        FunctionReward("lengths.py:length")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert FunctionReward("lengths.py:length").title == "length"
