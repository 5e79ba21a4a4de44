"""Completions, a reward that never returns, and the processes of a caller."""

from __future__ import annotations

import time

from lightning_mpo.rewards import Completion
from lightning_mpo.rewards.process import RewardCaller

BATCH = [Completion(f"p{i}", f"; {i}", f"{i}", 2, True, {}) for i in range(3)]


def sleeps(completions):
    time.sleep(100)


def alive(caller: RewardCaller) -> list[int]:
    """Return the ids of the processes of a caller."""
    return [process.pid for process in (caller._helper, caller._spawner) if process is not None]


def returns(completions):
    """Return 1 for each, so that a reward counts as working."""
    return [1.0] * len(completions)
