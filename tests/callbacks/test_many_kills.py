"""A few random kills of a stage, an objective with heads and critic, and callbacks with a state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.many_kills import FAMILIES

SCRIPT = Path(__file__).parents[1] / "support" / "many_kills.py"


@pytest.mark.slow
def test_random_kills_go_on_bit_for_bit(tmp_path):
    """`many_kills.py FOLDER` does so with all families, 20 kills each, in half an hour."""
    stages = ["HeadWarmup", "SupervisedWarmup masked"]
    families = [*stages, "agrpo", "mpo_ppo", "callbacks", "Scaffolded"]
    assert set(families) < set(FAMILIES)
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--kills", "4", "--seed", "3", *families]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert [line.split("  ")[0].strip() for line in lines] == families
    assert all("4 kills in" in line and "all went on bit for bit" in line for line in lines), (
        done.stdout
    )
