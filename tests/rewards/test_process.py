"""No reward ends, hangs or changes the run: it ends in one line that names the reward, or has no effect."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_mpo.rewards import Completion, ExactAnswer, RewardError
from lightning_mpo.rewards.functions import as_rewards
from lightning_mpo.rewards.process import RewardCaller

BATCH = [Completion(f"p{i}", f"; {i}", f"{i}", 2, True, {}) for i in range(3)]


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


def sleeps(completions):
    time.sleep(100)


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


def alive(caller: RewardCaller) -> list[int]:
    return [] if caller._helper is None else [caller._helper.pid]


def exists(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while exists(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not exists(pid)


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


def _square(x):
    return x * x


def left_pool(completions):
    pool = multiprocessing.get_context("fork").Pool(2)
    left_pool.kept = pool
    Path(left_pool.file).write_text(" ".join(str(worker.pid) for worker in pool._pool))
    return pool.map(_square, [1.0] * len(completions))


def test_nothing_is_left_of_the_process_and_of_its_pool(tmp_path) -> None:
    left_pool.file = str(tmp_path / "pids")
    (reward,) = as_rewards(left_pool)
    caller = RewardCaller([reward], 20, True)
    assert caller(reward, BATCH).scores == [1.0] * 3
    workers = [int(pid) for pid in Path(left_pool.file).read_text().split()]
    pids = [*workers, caller._helper.pid]
    assert all(exists(pid) for pid in pids)
    del caller
    gc.collect()
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("during", [False, True], ids=["between calls", "during a call"])
def test_the_process_ends_with_a_killed_run(tmp_path, during) -> None:
    code = (
        "import os, signal, threading, time\n"
        "from tests.rewards.test_process import BATCH, sleeps\n"
        "from lightning_mpo.rewards.functions import as_rewards\n"
        "from lightning_mpo.rewards.process import RewardCaller\n"
        "reward, = as_rewards(sleeps)\n"
        "caller = RewardCaller([reward], 60, True)\n"
        "print(caller._helper.pid, flush=True)\n"
        "threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()\n"
        f"caller(reward, BATCH) if {during} else time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert gone(int(run.stdout)), run.stderr


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT raise: a run that a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("process", [True, False])
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_the_users(process: bool) -> None:
    run = os.getpid()

    def interrupted(completions):
        os.kill(
            run, signal.SIGINT
        )  # while the run waits for this reward, however busy the machine is
        while True:
            time.sleep(0.01)

    (reward,) = as_rewards(interrupted)
    caller = RewardCaller([reward], 60, process)
    pids = alive(caller)
    with pytest.raises(KeyboardInterrupt):
        caller(reward, BATCH)
    assert len(pids) == process
    assert all(gone(pid) for pid in pids)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_just_before_the_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    class Pipe:
        """A pipe whose first wait loses the signal, as one that comes between the check for signals and the wait."""

        def send_bytes(self, question: bytes) -> None: ...

        def close(self) -> None: ...

        def poll(self, seconds: float) -> bool:
            waits.append(seconds)
            if len(waits) == 2:
                signal.raise_signal(signal.SIGINT)
            return False

    (reward,) = as_rewards(sleeps)
    caller = RewardCaller([reward], 60, True)
    monkeypatch.setattr(caller._helper, "pipe", Pipe())
    with pytest.raises(KeyboardInterrupt):
        caller(reward, BATCH)
    assert len(waits) == 2
    assert waits[0] <= 1


def signals_itself(completions):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return [1.0] * len(completions)


def test_signals_to_the_whole_run_do_not_end_the_process() -> None:
    (reward,) = as_rewards(signals_itself)
    caller = RewardCaller([reward], 5, True)
    assert caller(reward, BATCH).scores == [1.0] * 3
    caller.close()


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
