"""A list of stages with a kill in every stage ends as if nothing had been killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_kill_in_every_stage(tmp_path):
    script = str(Path(__file__).parents[1] / "support" / "killed_stages.py")
    done = subprocess.run(
        [sys.executable, script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert sum(line.endswith("bit for bit") for line in lines) == 12
