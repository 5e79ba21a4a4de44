"""The hostile programs: none passes, gets out, or harms the program after it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from lightning_mpo.rewards.sandbox import Job, Limits, Pool
from tests.support.hostile import ENDLESS, FORGED, LEAKS, MACHINE, SCRIPTS
from tests.support.sandboxes import PATIENT, isolating_level, results


def test_the_table_is_large() -> None:
    tables = (FORGED, MACHINE, LEAKS, ENDLESS, SCRIPTS)
    assert sum(map(len, tables)) >= 160
    assert len({code for table in tables for code in table.values()}) >= 160


@pytest.mark.parametrize("table", [FORGED, MACHINE, LEAKS], ids=["forged", "machine", "leaks"])
def test_none_passes_or_harms_the_next(table: dict[str, str]) -> None:
    hostile, good = results(table, PATIENT)
    assert [name for name, result in hostile.items() if result.passed or result.all_passed] == []
    assert [name for name, result in zip(table, good, strict=True) if not result.all_passed] == []


def test_nothing_is_left_outside() -> None:
    """No file, no process; the parent lives."""
    left = [
        Path(folder, "HOSTILE") for folder in ("/", "/usr", "/etc", "/dev", "/root", "/var/tmp")
    ]
    names = (
        "writes everywhere",
        "a link out",
        "a daemon",
        "processes left behind",
        "kills everything",
    )
    before = {process.pid for process in psutil.process_iter()}
    hostile, good = results({name: MACHINE[name] for name in names}, PATIENT)
    assert not any(result.all_passed for result in hostile.values())
    assert all(result.all_passed for result in good)
    assert [path for path in left if path.exists()] == []
    for _ in range(600):  # the kernel may take a moment
        new = {process.pid for process in psutil.process_iter()} - before
        if not any(_sleeps_for_long(pid) for pid in new):
            return
        time.sleep(0.1)
    pytest.fail("a process of a program is left")


def _sleeps_for_long(pid: int) -> bool:
    try:
        return "time.sleep(600)" in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def test_scripts() -> None:
    pool = Pool(isolating_level(), PATIENT, 1)
    try:
        done = pool.run([Job((code,), (("2 3", "5"),)) for code in SCRIPTS.values()])
        (right,) = pool.run([Job(("print(sum(map(int, input().split())))",), (("2 3", "5\n"),))])
    finally:
        pool.close()
    passed = [name for name, result in zip(SCRIPTS, done, strict=True) if result.all_passed]
    assert passed == []
    assert right.all_passed


@pytest.mark.parametrize(
    ("name", "end"),
    [("memory bomb in children", "memory"), ("an endless iterator", "exit"), ("zombies", "exit")],
)
def test_limits_end_a_program_with_patience(name: str, end: str) -> None:
    """These ends do not depend on the clock."""
    hostile, good = results({name: (ENDLESS | MACHINE)[name]}, PATIENT)
    assert (hostile[name].end, hostile[name].passed) == (end, 0)
    assert good[0].all_passed


def test_output_is_cut() -> None:
    pool = Pool(isolating_level(), PATIENT, 1)
    try:
        first, second = pool.run(
            [Job((text,), (("", "x"),)) for text in ("while True: print('x' * 999)", "print('x')")]
        )
    finally:
        pool.close()
    assert first.end == "output"
    assert second.all_passed


@pytest.mark.slow
def test_endless_programs_end() -> None:
    start = time.monotonic()
    hostile, good = results(ENDLESS, Limits(seconds=1, wall_seconds=8, memory_mib=512, disk_mib=16))
    assert [name for name, result in hostile.items() if result.passed] == []
    assert [name for name, r in zip(ENDLESS, good, strict=True) if not r.all_passed] == []
    assert time.monotonic() - start < 30 * len(ENDLESS)
    assert os.getppid() > 0
