"""A run that hangs says which process is waited for, and what it does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_mpo.callbacks import Heartbeat, Report
from lightning_mpo.callbacks.heartbeat import EXIT_CODE
from lightning_mpo.errors import UserError
from lightning_mpo.modules.beats import Beat, describe
from lightning_mpo.modules.hooks import RolloutCallback
from tests.support.runs import Digits, fit
from tests.support.sleeping_reward import Sleepy


def test_the_process_that_has_begun_the_fewest_phases_is_waited_for():
    beats = [
        Beat(9, "all-reduce", 40.0),
        Beat(9, "all-reduce", 12.0),
        Beat(9, "backward", 3.0),
        Beat(8, "sampling", 41.6),
    ]
    said = describe(beats, 30.0)
    assert said.startswith("rank 3: sampling, 42 s; waiting for it: ")
    assert "rank 0 (all-reduce, 40 s), rank 1 (all-reduce, 12 s), rank 2 (backward, 3 s)" in said


def test_of_equal_processes_all_are_named():
    assert describe([Beat(2, "backward", 5.0), Beat(2, "backward", 6.0)], 30.0) == (
        "rank 1: backward, 6 s; rank 0: backward, 5 s"
    )


def test_a_process_that_says_nothing_is_named_first():
    beats = [Beat(9, "all-reduce", 40.0), Beat(9, "sampling", 41.0, silent=35.0), None]
    assert describe(beats, 30.0) == (
        "rank 1: no sign of life for 35 s, last in sampling; rank 2: no sign of life; waiting for them: rank 0 (all-reduce, 40 s)"
    )


def test_of_many_processes_a_few_are_named():
    said = describe([Beat(9, "all-reduce", 40.0)] * 50 + [Beat(8, "sampling", 41.0)] * 14, 30.0)
    assert said.count("sampling") == 8
    assert "and 6 more" in said
    assert said.endswith("rank 3 (all-reduce, 40 s) and 46 more")


def test_one_process_says_what_it_does_and_never_gives_up(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    watch = Heartbeat(warn_after=0.3, abort_after=0.4, every=0.05)
    run = fit(tmp_path, rollout={"rewards": [Sleepy(1.2)]}, callbacks=[watch], max_steps=2)
    assert run.trainer.global_step == 2
    assert "rank 0: reward function, " in capfd.readouterr().err


def test_a_run_that_moves_is_quiet_and_its_thread_ends(tmp_path, capfd):
    watch = Heartbeat(warn_after=30.0, every=0.05)
    fit(tmp_path, rollout={"rewards": [Digits()]}, callbacks=[watch], max_steps=2)
    assert "heartbeat" not in capfd.readouterr().err
    assert watch._current_phase[0] > 10, "phases were begun"
    assert watch._stop is None


def test_held_out_prompts_that_are_sampled_count_as_progress(tmp_path):
    watch, moved = Heartbeat(warn_after=30.0), []

    class After(RolloutCallback):
        def on_evaluation_tokens(self, tokens, running):
            moved.append((watch._current_phase, watch._last_progress > 0))
            watch._last_progress = 0.0

    report = Report(
        problems=4, completions=2, batch_size=4
    )  # batches: two sampled and one greedy, before and after
    fit(tmp_path, callbacks=[watch, After(), report], max_steps=1, limit_val_batches=1, val_check_interval=1,
        check_val_every_n_epoch=None)  # fmt: skip
    assert all(fresh for _, fresh in moved)
    phases = [phase for _, phase in dict.fromkeys(phase for phase, _ in moved)]
    assert phases == [*["evaluation"] * 3, "validation", *["evaluation"] * 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"every": 0}, "every"), ({"warn_after": 60, "abort_after": 30}, "abort_after")],
)
def test_times_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        Heartbeat(**options)


def run_two(
    folder: Path, seconds: float, abort_after: float
) -> tuple[subprocess.CompletedProcess, float]:
    script = str(Path(__file__).parents[1] / "support" / "sleeping_reward.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PL_")} | {
        "OMP_NUM_THREADS": "1"
    }
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, script, str(folder), str(seconds), str(abort_after)],
        capture_output=True, text=True, timeout=200, env=environment, check=False,
    )  # fmt: skip
    return done, time.monotonic() - started


@pytest.mark.slow
def test_the_other_process_names_the_one_whose_reward_sleeps(tmp_path):
    done, _ = run_two(tmp_path, 6, 100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "done-0").exists()
    lines = [
        line
        for line in done.stderr.splitlines()
        if line.startswith("heartbeat  rank 0: no progress")
    ]
    assert any(
        "rank 1: reward function, " in line and "waiting for it: rank 0 (all-reduce" in line
        for line in lines
    ), done.stderr[-2000:]


@pytest.mark.slow
def test_the_run_ends_with_that_message_instead_of_hanging(tmp_path):
    done, seconds = run_two(tmp_path, 150, 5)
    assert done.returncode == EXIT_CODE, done.stderr[-2000:]
    assert seconds < 120, "it waited for the sleeper"
    last = next(line for line in done.stderr.splitlines() if line.endswith("giving up"))
    assert "rank 1: reward function, " in last
    assert "time.sleep(self.seconds)" in done.stderr, "where the sleeper stands"
