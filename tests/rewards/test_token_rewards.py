"""`TokenReward`: one number per token, checked, weighted, joined and placed at its token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_mpo.functional.advantages import at_tokens
from lightning_mpo.rewards import (
    Completion,
    Reward,
    RewardError,
    TokenReward,
    join_reward_scores,
    score_all,
    take_reward_scores,
)
from lightning_mpo.rewards.process import RewardCaller
from lightning_mpo.rewards.scoring import unjudged

LENGTHS = [3, 1, 4, 2]


def completion(tokens: int) -> Completion:
    return Completion("prompt", "text", "x", tokens, True, {}, token_ids=tuple(range(tokens)))


BATCH = [completion(tokens) for tokens in LENGTHS]


class Given(TokenReward):
    """Returns given rows; a row that is a function is called first."""

    def __init__(self, rows: Any, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.rows = rows

    def token_scores(self, completions: Sequence[Completion]) -> Any:
        return self.rows(completions) if isinstance(self.rows, Callable) else self.rows


class Fixed(Reward):
    """Returns given numbers."""

    def __init__(self, values: list[float | None], weight: float = 1.0) -> None:
        super().__init__(weight)
        self.values = values

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return self.values


ROWS = [[1.0, 0.0, 0.5], None, [0.0, 0.25, 0.0, -1.0], [2.0, 4.0]]


def test_weighted_rewards_of_tokens_and_of_responses_add_up() -> None:
    other = Given([[1.0, 1.0, 1.0], [8.0], None, [0.0, -1.0]], weight=0.5)
    scores = score_all([Fixed([1.0, None, 2.0, 4.0], 3.0), Given(ROWS, 2.0), other], BATCH)
    assert scores.token_rewards_BC is not None
    assert scores.token_rewards_BC.tolist() == [
        [2.5, 0.5, 1.5, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, -2.0], [4.0, 7.5, 0.0, 0.0],
    ]  # fmt: skip
    assert scores.rewards_B.tolist() == [3 + 4.5, 4.0, 6 - 1.5, 12 + 11.5]
    assert scores.by_reward["given"].nan_to_num(-9.0).tolist() == [1.5, -9.0, -0.75, 6.0]
    assert scores.by_reward["given_2"].nan_to_num(-9.0).tolist() == [3.0, 8.0, -9.0, -1.0]


def test_without_a_reward_of_tokens_there_are_none() -> None:
    rewards = [Fixed([1.0] * 4)]
    assert score_all(rewards, BATCH).token_rewards_BC is None
    assert unjudged(rewards, 4).token_rewards_BC is None


def test_a_row_of_none_is_not_judged_and_an_empty_one_is() -> None:
    batch = [completion(2), completion(0), completion(0)]
    scores = score_all([Given([None, [], None])], batch)
    assert scores.valid_B.tolist() == [False, True, False]
    assert scores.rewards_B.tolist() == [0.0, 0.0, 0.0]
    assert score_all([Given([[]])], [completion(0)]).token_rewards_BC.shape == (1, 0)
    assert score_all([Given([])], []).token_rewards_BC.shape == (0, 0)


def test_equal_numbers_in_another_order_have_equal_sums() -> None:
    rows = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]
    assert sum(rows[0]) != sum(rows[1])
    first, second = Given(rows).score([])
    assert first == second == 0.6
    sums_B = score_all([Given(rows)], [completion(3)] * 2).rewards_B
    assert sums_B[0] == sums_B[1] == 0.6


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 0.0], *ROWS[1:]], r"one number per token \(3\) of completion 0 \('text'\), got 2"),
        ([[1.0] * 4, *ROWS[1:]], r"one number per token \(3\) of completion 0 \('text'\), got 4"),
        ([iter([1.0] * 9), *ROWS[1:]], r"one number per token \(3\) of completion 0.*, got more"),
        (
            [*ROWS[:3], [0.0, float("nan")]],
            r"returned nan for token 1 of completion 3 \('text'\); return a finite number",
        ),
        ([*ROWS[:3], [None, 1.0]], r"returned None for token 0 of completion 3"),
        ([*ROWS[:3], ["a", 1.0]], r"returned 'a' for token 0 of completion 3"),
        ([*ROWS[:3], [1e39, 1.0]], r"returned 1e\+39 for token 0.*float32 holds numbers up to"),
        ([1.0] * 4, r"a list of 3 numbers for completion 0 \('text'\), or None, got float"),
        (ROWS[:3], r"must return one list per completion \(4\), got 3"),
        (1.0, r"must return a list of 4 lists of numbers, got float"),
        (lambda completions: 1 / 0, r"raised ZeroDivisionError"),
    ],
)
def test_wrong_rows_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(RewardError, match="reward `Given`, in `token_scores`, .*" + message):
        score_all([Given(rows)], BATCH)


def test_sums_over_some_tokens_that_float32_does_not_hold_are_refused() -> None:
    with pytest.raises(RewardError, match="absolute rewards of the tokens of completion 0 is 6e"):
        score_all([Given([[3e38, -3e38]])], [completion(2)])


def test_tensors_arrays_and_generators_are_fine() -> None:
    rows = [torch.tensor([1.0, 0.0, 0.5]), None, (x for x in ROWS[2]), torch.tensor([2, 4]).numpy()]
    given, expected = (score_all([Given(values)], BATCH) for values in (rows, ROWS))
    assert torch.equal(given.token_rewards_BC, expected.token_rewards_BC)
    assert torch.equal(given.rewards_B, expected.rewards_B)


def test_the_helper_process_returns_the_same() -> None:
    reward = Given(ROWS)
    here, there = RewardCaller([reward], 5, False), RewardCaller([reward], 5, True)
    try:
        assert here(reward, BATCH) == there(reward, BATCH)
        assert there(reward, BATCH).token_scores == ROWS
    finally:
        there.close()


def test_rows_are_split_and_joined_over_different_widths() -> None:
    whole = score_all([Given(ROWS), Fixed([1.0] * 4)], BATCH)
    narrow = score_all([Given([[7.0]]), Fixed([1.0])], [completion(1)])
    none = unjudged([Given(ROWS), Fixed([])], 1)
    parts = [take_reward_scores(whole, torch.tensor(rows)) for rows in ([3, 0], [2])]
    again = join_reward_scores([narrow, *parts, none])
    expected = [[7.0, 0, 0, 0], [2.0, 4, 0, 0], [1.0, 0, 0.5, 0], [0.0, 0.25, 0, -1], [0.0] * 4]
    assert again.token_rewards_BC.tolist() == expected
    with pytest.raises(ValueError, match="same rewards: 1 of 2 have rewards of tokens"):
        join_reward_scores(
            [whole, replace(narrow, by_reward=whole.by_reward, token_rewards_BC=None)]
        )


def test_rewards_stand_at_the_tokens_of_the_mask() -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    by_token = torch.tensor([[1.0, 2, 3, 9], [9, 9, 9, 9], [5, 9, 9, 9]])
    placed = at_tokens(by_token, torch.tensor([6.5, 4, 5]), mask)
    assert placed.tolist() == [[1, 0, 2, 3.5, 0], [0] * 5, [5, 0, 0, 0, 0]]
    fewer = at_tokens(by_token[:, :0], torch.tensor([6.5, 4, 5]), mask)
    assert fewer.tolist() == [[0, 0, 0, 6.5, 0], [0] * 5, [5, 0, 0, 0, 0]]
