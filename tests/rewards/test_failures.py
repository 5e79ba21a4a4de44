"""A reward that fails costs the completions on which it fails, and never the run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import time
import warnings

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Completion, Reward, RewardError, TokenReward, score_all
from lightning_mpo.rewards.failures import Failures
from lightning_mpo.rewards.process import RewardCaller
from lightning_mpo.rewards.resolving import as_rewards
from tests.support.failing_rewards import BATCH, alive

BAD = "1"
"""Target of the completion on which the rewards of this file fail."""


def on_bad(misbehave):
    """Return a function that misbehaves if it gets the bad completion, and else returns ones."""

    def reward(completions, target):
        return misbehave(len(completions)) if BAD in target else [1.0] * len(completions)

    reward.__name__ = misbehave.__name__
    return reward


def raises(n):
    raise ValueError("no")


def exits(n):
    sys.exit(3)


def returns_nan(n):
    return [1.0, float("nan"), 1.0] if n == 3 else [float("nan")]


def returns_too_much(n):
    return [10**400] * n


def returns_text(n):
    return ["good"] * n


def returns_too_few(n):
    return [1.0] * (n - 1)


def os_exits(n):
    os._exit(0)


def crashes(n):
    ctypes.string_at(0)


def closes_its_pipes(n):
    os.closerange(3, 200)
    return [1.0] * n


ANYWHERE = [raises, exits, returns_nan, returns_too_much, returns_text, returns_too_few]
IN_A_PROCESS = [os_exits, crashes, closes_its_pipes]
CASES = [(f, False) for f in ANYWHERE] + [(f, True) for f in (*ANYWHERE, *IN_A_PROCESS)]


@pytest.mark.parametrize(
    ("misbehave", "process"), CASES, ids=[f"{f.__name__}-{p}" for f, p in CASES]
)
def test_one_completion_pays(misbehave, process) -> None:
    (reward,) = as_rewards(on_bad(misbehave))
    caller = RewardCaller([reward], 60, process)
    assert caller(reward, BATCH[:1]).scores == [1.0]
    with pytest.warns(UserWarning, match="1 of 3 completions, judged one by one, failed: they are"):
        judgement = caller(reward, BATCH)
    assert judgement.scores == [1.0, None, 1.0]
    assert judgement.answered == [True, False, True]
    assert [line is not None for line in judgement.errors] == [False, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second failure of a kind is counted, and not told
        assert caller(reward, BATCH).scores == [1.0, None, 1.0]
    caller.close()


def test_one_that_hangs_pays_and_the_limit_of_each_is_a_share(tmp_path, monkeypatch) -> None:
    """The clock jumps by a day for each hanging call, so that no test waits for a limit."""

    def hangs(n):
        (tmp_path / f"{time.time_ns()}").touch()
        time.sleep(100)

    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 86_400 * len(os.listdir(tmp_path)))
    (reward,) = as_rewards(on_bad(hangs))
    caller = RewardCaller([reward], 6000, True)
    with pytest.warns(UserWarning, match="took more than 6000 seconds for 3 completions"):
        judgement = caller(reward, BATCH)
    assert judgement.scores == [1.0, None, 1.0]
    assert "took more than 2000 seconds for 1 completions" in judgement.errors[1]
    caller.close()


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_stated_value_in_place_of_none(value) -> None:
    (reward,) = as_rewards(on_bad(raises))
    reward.is_accuracy = True
    caller = RewardCaller([reward], 60, False, failed_reward=value)
    with pytest.warns(
        UserWarning, match=rf"failed: they get {value:g} \(`rollout.failed_reward`\)"
    ):
        scores = score_all([reward], BATCH, caller)
    assert scores.rewards_B.tolist() == [1.0, value, 1.0]
    assert scores.failures_B.tolist() == [False, True, False]
    assert scores.answered_B.tolist() == [True, False, True]
    assert scores.correct_B.tolist() == [True, False, True]
    assert scores.decided_B.all()


def test_a_first_call_with_a_wrong_count_is_a_mistake() -> None:
    (reward,) = as_rewards(lambda completions: [1.0])
    with pytest.raises(RewardError, match="must return one number per completion"):
        RewardCaller([reward], 60, False)(reward, BATCH)


class OfTokens(TokenReward):
    def token_scores(self, completions):
        if any(c.target == BAD for c in completions):
            raise ValueError("no")
        return [[1.0] * len(c.token_ids) for c in completions]


@pytest.mark.parametrize("value", [None, -2.0])
def test_a_reward_of_tokens_that_fails_has_its_value_at_the_last_token(value) -> None:
    reward, rows = (
        OfTokens(),
        [Completion("p", "t", t, 2, True, {}, token_ids=(5, 6)) for t in "01"],
    )
    rows.append(Completion("p", "", BAD, 0, True, {}))
    caller = RewardCaller([reward], 60, False, failed_reward=value)
    with pytest.warns(UserWarning, match="2 of 3 completions"):
        scores = score_all([reward], rows, caller)
    last = 0.0 if value is None else value
    assert scores.token_rewards_BC.tolist() == [[1.0, 1.0], [0.0, last], [0.0, 0.0]]
    assert scores.rewards_B.tolist() == [2.0, last, last]
    assert scores.valid_B.tolist() == [True, value is not None, value is not None]


class NamesTheFailed(Reward):
    def score(self, completions):
        return [RewardError("it raised Nothing") if c.target == BAD else 1.0 for c in completions]


def test_a_reward_may_name_the_completions_on_which_it_fails() -> None:
    reward = NamesTheFailed()
    caller = RewardCaller([reward], 60, True)
    with pytest.warns(UserWarning, match="it raised Nothing; 1 of 3 completions"):
        judgement = caller(reward, BATCH)
    assert judgement.scores == [1.0, None, 1.0]
    caller.close()


def test_a_first_call_that_fails_for_all_is_a_mistake_and_later_ones_are_told_each_time() -> None:
    fails = True

    def always(completions):
        if fails:
            raise ValueError("no")
        return [1.0] * len(completions)

    (reward,) = as_rewards(always)
    caller = RewardCaller([reward], 60, False)
    with pytest.raises(RewardError, match="reward `always` raised ValueError: no"):
        caller(reward, BATCH)
    fails = False
    caller(reward, BATCH)
    fails = True
    for count in (1, 2):
        line = f"raised ValueError: no .*; all 3 completions failed, in {count} calls so far"
        with pytest.warns(UserWarning, match=line):
            assert caller(reward, BATCH).scores == [None] * 3
    # a resumed run knows that the reward has worked
    again = RewardCaller([reward], 60, False)
    again.failures.load(caller.failures.total_failures)
    with pytest.warns(UserWarning, match="in 3 calls so far"):
        again(reward, BATCH)
    with pytest.raises(TypeError, match="`total_failures` of RolloutLoop must hold counts"):
        again.failures.load({0: -1})


def test_a_process_that_ends_is_replaced_also_while_a_gpu_is_in_use(monkeypatch) -> None:
    (reward,) = as_rewards(on_bad(os_exits))
    caller = RewardCaller([reward], 60, True)
    before = alive(caller)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.warns(UserWarning, match="ended its process with exit code 0"):
        caller(reward, BATCH)
    assert caller.process
    assert [pid in before for pid in alive(caller)] == [False, True]
    caller.close()


def test_a_spawner_that_ends_is_replaced_too() -> None:
    (reward,) = as_rewards(on_bad(os_exits))
    caller = RewardCaller([reward], 60, True)
    caller._spawner.close()
    caller.end_helper()
    with pytest.warns(UserWarning, match="the process that starts helpers for rewards was ended"):
        assert caller(reward, BATCH).scores == [1.0, None, 1.0]
    caller.close()


def leaks(completions):
    for _ in range(60_000 if hasattr(leaks, "called") else 10):
        os.open(os.devnull, os.O_RDONLY)
    leaks.called = True
    return [1.0] * len(completions)


def test_leaked_files_end_with_the_process_that_leaked_them(monkeypatch) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    (reward,) = as_rewards(leaks)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # the helper inherits it
    try:
        caller = RewardCaller([reward], 60, True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caller(reward, BATCH).scores == [1.0] * 3
    with pytest.warns(UserWarning, match="Too many open files.*all 3 completions failed"):
        assert caller(reward, BATCH).scores == [None] * 3
    assert caller(reward, BATCH).scores == [1.0] * 3
    caller.close()


def closes_its_output(completions):
    sys.stdout.close()
    with contextlib.suppress(OSError):
        os.close(1)
    return [1.0] * len(completions)


def forks(completions):
    if os.fork() == 0:
        return [0.0] * len(completions)  # the child answers as well, and is not heard
    os.wait()
    return [1.0] * len(completions)


@pytest.mark.parametrize("function", [closes_its_output, forks])
def test_no_failure(function) -> None:
    (reward,) = as_rewards(function)
    caller = RewardCaller([reward], 60, True)
    for _ in range(3):
        assert caller(reward, BATCH).scores == [1.0] * 3
    caller.close()


def test_kinds_of_errors_and_the_option() -> None:
    failures = Failures()
    assert failures.value is None
    with pytest.raises(UserError, match=re.escape("`rollout.failed_reward` must be a number")):
        Failures("none")
