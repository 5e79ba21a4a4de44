"""The process of rewards ends with its run, and signals reach the run."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_mpo.rewards.process import RewardCaller
from lightning_mpo.rewards.resolving import as_rewards
from tests.support.failing_rewards import BATCH, alive, sleeps


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


@pytest.mark.slow
@pytest.mark.parametrize("during", [False, True], ids=["between calls", "during a call"])
def test_the_process_ends_with_a_killed_run(tmp_path, during) -> None:
    code = (
        "import os, signal, threading, time\n"
        "from tests.support.failing_rewards import BATCH, sleeps\n"
        "from lightning_mpo.rewards.resolving import as_rewards\n"
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
    helper = caller._helper.pid if process else None
    with pytest.raises(KeyboardInterrupt):
        caller(reward, BATCH)
    assert helper is None or gone(helper)
    caller.close()
    assert len(pids) == (2 if process else 0)  # the spawner and its helper
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
