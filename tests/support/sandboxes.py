"""Pools of sandboxes for tests, and results of the hostile programs."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.programs import job_of
from lightning_mpo.rewards.sandbox import Job, Level, Limits, Pool, Result, strongest_level
from tests.support.hostile import TESTS

PATIENT = Limits(seconds=30, wall_seconds=300, memory_mib=512, disk_mib=16, output_mib=1)
"""Limits of time that a good program keeps on a machine with much other work."""


def isolating_level() -> Level:
    """Return the level with bubblewrap; skip the test where it is missing."""
    try:
        return strongest_level(allow_weak=False)
    except UserError as error:
        pytest.skip(str(error))


def adding(code: str) -> Job:
    """Return a program that should define `add`, with its tests."""
    job = job_of({"test": TESTS, "entry_point": "add", "prompt": ""}, code, each=False)
    assert job is not None
    return job


GOOD = adding(
    "import math, json, random\ndef add(a, b):\n    return sum([a, b]) if a > 0 else b + a"
)


def results(programs: Mapping[str, str], limits: Limits) -> tuple[dict[str, Result], list[Result]]:
    """Run programs in one sandbox, and a good one after each of them.

    Returns:
        The results of the programs by name, and those of the good one.
    """
    os.environ["SECRET_OF_THE_RUN"] = "secret"
    pool = Pool(isolating_level(), limits, 1)
    try:
        jobs = [job for code in programs.values() for job in (adding(code), GOOD)]
        done = pool.run(jobs)
    finally:
        pool.close()
        del os.environ["SECRET_OF_THE_RUN"]
    return dict(zip(programs, done[::2], strict=True)), done[1::2]
