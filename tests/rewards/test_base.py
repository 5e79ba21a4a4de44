"""`score_all`: sums, masks, names, and every way in which a reward can be wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch

from lightning_mpo.rewards import (
    Completion,
    ExactAnswer,
    FunctionReward,
    Reward,
    RewardError,
    completions_of,
    join_reward_scores,
    score_all,
    take_reward_scores,
)
from lightning_mpo.rewards.scoring import unjudged
from lightning_mpo.types import PromptRow, Rollout


def completion(text: str = "1; 51", target: str = "51", finished: bool = True) -> Completion:
    return Completion("prompt", text, target, len(text), finished, {})


class Fixed(Reward):
    """Returns what it was given, calling it when it can be called."""

    def __init__(self, value: Any, weight: float = 1.0, answers: Any = None) -> None:
        super().__init__(weight)
        self.value, self.answers = value, answers

    def score(self, completions: Sequence[Completion]) -> Any:
        return self.value(completions) if isinstance(self.value, Callable) else self.value

    def answered(self, completions: Sequence[Completion]) -> Any:
        return super().answered(completions) if self.answers is None else self.answers


class FixedAccuracy(Fixed):
    is_accuracy: ClassVar[bool] = True


class Fixed3(Fixed):
    """Its name, `fixed3`, is close to the second `fixed`."""


PAIR = [completion(), completion()]


def test_weighted_sum() -> None:
    scores = score_all([Fixed([1.0, 0.0], weight=2.0), Fixed([0.5, -1], weight=-1.0)], PAIR)
    assert scores.rewards_B.tolist() == [1.5, 1.0]
    assert scores.rewards_B.dtype == torch.float64
    assert scores.by_reward["fixed"].tolist() == [1.0, 0.0]  # unweighted
    assert scores.valid_B.all()
    assert scores.answered_B.all()


def test_none_abstains_and_a_row_is_invalid_only_where_all_do() -> None:
    four = [completion()] * 4
    math = FixedAccuracy([1.0, 0.0, None, None], weight=3.0, answers=[True, False, False, False])
    code = FixedAccuracy([None, None, 1.0, None], answers=[False, True, True, False])
    scores = score_all([math, code], four)
    assert (
        scores.valid_B.tolist()
        == scores.judged_B.tolist()
        == scores.decided_B.tolist()
        == [True] * 3 + [False]
    )
    assert scores.rewards_B.tolist() == [3.0, 0.0, 1.0, 0.0]
    assert scores.correct_B.tolist() == [True, False, True, False]
    assert scores.answered_B.tolist() == [True, False, True, False]
    assert scores.by_reward["fixed_accuracy"].isnan().tolist() == [False, False, True, True]


def test_a_row_that_only_other_rewards_judged_is_neither_right_nor_wrong() -> None:
    scores = score_all([FixedAccuracy([None, 0.0]), Fixed([2.0, 2.0])], PAIR)
    assert scores.valid_B.tolist() == [True, True]
    assert scores.decided_B.tolist() == [False, True]
    assert scores.correct_B.tolist() == [False, False]


def test_correct_needs_every_accuracy_reward() -> None:
    rewards = [FixedAccuracy([1.0, 1.0]), FixedAccuracy([1.0, 0.5]), Fixed([0.0, 0.0])]
    assert score_all(rewards, PAIR).correct_B.tolist() == [True, False]
    assert not score_all([Fixed([1.0, 1.0])], PAIR).correct_B.any()
    assert not score_all([FixedAccuracy([None, None])], PAIR).correct_B.any()


def test_answered_needs_every_reward() -> None:
    rewards = [Fixed([0.0, 0.0], answers=[True, False]), Fixed([0.0, 0.0])]
    assert score_all(rewards, PAIR).answered_B.tolist() == [True, False]


def test_no_completions_and_no_rewards() -> None:
    assert score_all([Fixed([])], []).rewards_B.shape == (0,)
    assert score_all([], PAIR).rewards_B.tolist() == [0.0, 0.0]


def test_names_never_collide() -> None:
    rewards = [Fixed([float(i)] * 2) for i in range(3)]
    assert list(score_all(rewards, PAIR).by_reward) == ["fixed", "fixed_2", "fixed_3"]
    assert ExactAnswer().name == "exact_answer"
    named = type("Fixed_3", (Fixed,), {})
    parts = score_all(
        [Fixed([0.0, 0]), named([1.0, 1]), Fixed([2.0, 2]), Fixed([3.0, 3])], PAIR
    ).by_reward
    assert sorted(part[0].item() for part in parts.values()) == [0, 1, 2, 3]


def _raise(completions: Sequence[Completion]) -> None:
    raise KeyError("solution")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (_raise, r"reward `Fixed` raised KeyError: 'solution'"),
        (
            [1.0, float("nan")],
            r"returned nan for completion 1 \('1; 51'\); return a finite number, or None",
        ),
        ([float("inf"), 1.0], r"returned inf for completion 0"),
        ([1.0, "good"], r"returned 'good' for completion 1"),
        ([1.0, [2.0]], r"returned \[2.0\] for completion 1"),
        (torch.ones(2, 2), r"returned tensor"),
        ([1.0], r"one number per completion \(2\), got 1"),
        ([1.0, 1.0, 1.0], r"one number per completion \(2\), got 3"),
        (1.0, r"must return a list of 2 numbers, got float"),
        (None, r"must return a list of 2 numbers, got NoneType"),
        ("ab", r"must return a list of 2 numbers, got str"),
        ({0: 1.0, 1: 1.0}, r"must return a list of 2 numbers, got dict"),
    ],
)
def test_wrong_scores_are_refused(value: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_all([Fixed(value)], PAIR)


@pytest.mark.parametrize("answers", [[True], True, "ab"])
def test_wrong_answered_is_refused(answers: Any) -> None:
    with pytest.raises(RewardError, match="`Fixed`, in `answered`, must return"):
        score_all([Fixed([0.0, 0.0], answers=answers)], PAIR)


def test_tensors_and_bools_are_fine() -> None:
    assert score_all([Fixed(torch.tensor([1.0, 2.0]))], PAIR).rewards_B.tolist() == [1, 2]
    assert score_all([Fixed([True, False])], PAIR).rewards_B.tolist() == [1, 0]


def test_completions_of_a_rollout() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rollout = Rollout(
        tokens_BL=torch.zeros(2, 5, dtype=torch.long),
        attention_mask_BL=torch.ones(2, 5, dtype=torch.bool),
        response_mask_BT=mask,
        group_B=torch.tensor([0, 0]),
        behaviour_logprobs_BT=torch.zeros(2, 3),
        finish_B=torch.tensor([0, 1]),
        texts=("a", "b"),
        rows=(PromptRow("p", "1", extra={"level": 2}), PromptRow("q", "2")),
    )
    first, second = completions_of(rollout)
    assert first == Completion("p", "a", "1", 2, True, {"level": 2}, token_ids=(0, 0))
    assert second == Completion("q", "b", "2", 3, False, {}, token_ids=(0, 0, 0))


def test_scores_are_split_and_joined_row_by_row():
    batch = [completion(text) for text in ("51", "3", "51", "x")]
    rewards = [
        FixedAccuracy([1.0, 0.0, None, 0.25]),
        Fixed([0.5, 1.5, 2.5, 3.5], answers=[True, False, True, True]),
    ]
    whole = score_all(rewards, batch)
    parts = [take_reward_scores(whole, torch.tensor(rows)) for rows in ([3, 0], [1], [2])]
    again = join_reward_scores(parts)
    order = torch.tensor([3, 0, 1, 2])
    for name in ("rewards_B", "valid_B", "correct_B", "answered_B"):
        assert torch.equal(getattr(again, name), getattr(whole, name)[order]), name
    assert list(again.by_reward) == list(whole.by_reward) == ["fixed_accuracy", "fixed"]
    for name, values in whole.by_reward.items():
        torch.testing.assert_close(again.by_reward[name], values[order], equal_nan=True)


def test_scores_of_other_rewards_are_not_joined():
    first, second = (
        score_all([reward], [completion()]) for reward in (Fixed([1.0]), ExactAnswer())
    )
    with pytest.raises(ValueError, match="same rewards"):
        join_reward_scores([first, second])


@pytest.mark.parametrize(("score", "right"), [(0.5, False), (0.51, True)])
def test_right_begins_above_one_half(score: float, right: bool) -> None:
    class Half(Reward):
        is_accuracy = True

        def score(self, completions: Sequence[Completion]) -> list[float | None]:
            return [score] * len(completions)

    done = [Completion("p", "t", "x", 1, True, {})]
    assert score_all([Half()], done).correct_B.tolist() == [right]


def test_a_sum_that_float32_does_not_hold_is_refused() -> None:
    class Large(Reward):
        def score(self, completions: Sequence[Completion]) -> list[float | None]:
            return [3e38] * len(completions)

    done = [Completion("p", "t", "x", 1, True, {})]
    with pytest.raises(
        RewardError,
        match=r"completion 0 is 6e\+38, more than float32 holds; lower the weights \(Large",
    ):
        score_all([Large(), Large()], done)


def test_rows_that_nobody_judged_have_the_parts_of_all_rewards() -> None:
    class Plain(Reward):
        def score(self, completions: Sequence[Completion]) -> list[float | None]:
            return [1.0] * len(completions)

    rewards, done = [Plain(), Plain()], [Completion("p", "t", "x", 1, True, {})] * 2
    none, some = unjudged(rewards, 2), score_all(rewards, done)
    assert list(none.by_reward) == list(some.by_reward) == ["plain", "plain_2"]
    assert not (
        none.judged_B | none.valid_B | none.correct_B | none.answered_B | none.decided_B
    ).any()
    assert join_reward_scores([none, some]).judged_B.tolist() == [False, False, True, True]


def test_an_exception_names_the_line_of_the_users_code(tmp_path, monkeypatch):
    (tmp_path / "placed_rewards.py").write_text(
        "import json\n\n\ndef reads(completions, **columns):\n    return [json.loads('{') for _ in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    from placed_rewards import reads

    with pytest.raises(RewardError) as raised:
        score_all([FunctionReward(reads)], PAIR)
    assert str(raised.value).startswith("reward `reads` raised JSONDecodeError: ")
    assert str(raised.value).endswith(" (placed_rewards.py, line 5)"), "not the line within json"
