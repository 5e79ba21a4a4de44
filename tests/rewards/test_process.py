"""No reward ends, hangs or changes the run: it ends in one line that names the reward, or has no effect."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import random
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch

from lightning_mpo.rewards import ExactAnswer, RewardError
from lightning_mpo.rewards.isolation import limited
from lightning_mpo.rewards.process import RewardCaller
from lightning_mpo.rewards.resolving import as_rewards
from tests.support.failing_rewards import BATCH, alive, sleeps


def exits(completions):
    sys.exit(0)


def os_exits(completions):
    os._exit(0)


def crashes(completions):
    ctypes.string_at(0)


def interrupts(completions):
    raise KeyboardInterrupt


def recurses(completions):
    return recurses(completions)


def loops_in_c(completions):
    return [re.match(r"(a+)+$", "a" * 40 + "b")]


def swallows(completions):
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(100)


def closes_files(completions):
    os.closerange(3, 200)
    return [1.0] * len(completions)


def reads_input(completions):
    return [float(input())]


def raises_lines(completions):
    raise ValueError("one\ntwo")


def number_exits(completions):
    class Number:
        def __float__(self):
            sys.exit(0)

    return [Number()] * len(completions)


ENDS = [
    (exits, "raised SystemExit: 0"),
    (os_exits, "ended its process with exit code 0; a reward must return"),
    (crashes, "crashed its process with SIGSEGV"),
    (interrupts, "raised KeyboardInterrupt"),
    (recurses, "raised RecursionError: maximum recursion depth exceeded"),
    (sleeps, "took more than 0.4 seconds for 3 completions, the limit of `rollout.reward_seconds`"),
    (loops_in_c, "took more than 0.4 seconds"),
    (swallows, "took more than 0.4 seconds"),
    (closes_files, "ended its process"),
    (reads_input, "raised EOFError"),
    (raises_lines, "raised ValueError: one two"),
    (number_exits, "returned <"),
]
HERE = [
    case
    for case in ENDS
    if case[0] not in (os_exits, crashes, loops_in_c, swallows, closes_files, reads_input)
]


@pytest.mark.parametrize(("function", "message"), ENDS, ids=[case[0].__name__ for case in ENDS])
def test_a_reward_in_a_process_ends_in_one_line(function, message) -> None:
    (reward,) = as_rewards(function)
    caller = RewardCaller([reward], 0.4, process=True)
    with pytest.raises(
        RewardError, match=re.escape(f"reward `{function.__name__}` {message}")
    ) as caught:
        caller(reward, BATCH)
    assert "\n" not in str(caught.value)
    caller.close()
    assert alive(caller) == []


@pytest.mark.parametrize(("function", "message"), HERE, ids=[case[0].__name__ for case in HERE])
def test_a_reward_in_this_process_ends_in_one_line(function, message) -> None:
    (reward,) = as_rewards(function)
    with pytest.raises(RewardError, match=re.escape(f"reward `{function.__name__}` {message}")):
        RewardCaller([reward], 0.4, process=False)(reward, BATCH)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def meddles(completions):
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    return [1.0] * len(completions)


@pytest.mark.parametrize("process", [False, True])
def test_a_reward_that_meddles_changes_nothing(process) -> None:
    def state():
        return (
            os.getcwd(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
        )  # fmt: skip

    (reward,) = as_rewards(meddles)
    before = state()
    caller = RewardCaller([reward], 5, process)
    assert caller(reward, BATCH).scores == [1.0] * 3
    assert state() == before
    caller.close()


def throws_dice(completions):
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def test_random_numbers_of_a_reward_depend_on_seed_and_completions_alone(monkeypatch) -> None:
    (reward,) = as_rewards(throws_dice)
    here, there = RewardCaller([reward], 5, False), RewardCaller([reward], 5, True)
    first = here(reward, BATCH)
    assert here(reward, BATCH) == first == there(reward, BATCH)
    assert here(reward, BATCH[::-1]) != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert here(reward, BATCH) != first
    there.close()


def test_built_in_rewards_stay_here_and_objects_are_inherited() -> None:
    seen = []

    def closure(completions):
        seen.append(os.getpid())
        return [float(len(seen))] * len(completions)

    exact, own = as_rewards([ExactAnswer(), closure])
    assert not RewardCaller([exact], 5, True).process
    caller = RewardCaller([exact, own], 5, True)
    assert caller(exact, BATCH).scores == [1.0] * 3
    assert [caller(own, BATCH).scores[0] for _ in range(2)] == [1.0, 2.0]
    assert seen == []
    caller.close()
    here = RewardCaller([exact, own], 5, False)
    here(own, BATCH)
    assert seen == [os.getpid()]


def test_a_caller_is_pickled_without_its_process() -> None:
    (reward,) = as_rewards(meddles)
    caller = RewardCaller([reward], 5, True)
    again = pickle.loads(pickle.dumps(caller))
    assert again._helper is None
    assert again(again.rewards[0], BATCH).scores == [1.0] * 3
    assert again._helper.pid != caller._helper.pid
    for one in (caller, again):
        one.close()


def test_a_limit_that_passes_as_the_call_ends_is_reported(monkeypatch) -> None:
    set_timer, ends = signal.setitimer, list[int]()

    def late(which: int, seconds: float, interval: float = 0.0) -> tuple[float, float]:
        if not seconds and not ends:
            ends.append(which)
            signal.raise_signal(signal.SIGALRM)
        return set_timer(which, seconds, interval)

    monkeypatch.setattr(signal, "setitimer", late)
    before = signal.getsignal(signal.SIGALRM)
    with (
        pytest.raises(RewardError, match=r"took more than 60 seconds"),
        limited(ExactAnswer(), 1, 60),
    ):
        pass
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
