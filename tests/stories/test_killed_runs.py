"""Twenty runs that are killed anywhere end as if they had not been killed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_twenty_runs_that_are_killed_anywhere(tmp_path, tiny_folder):
    """Rollout, micro-batch, update, validation, a checkpoint half-written, without its name, and just saved."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    script = str(Path(__file__).parents[1] / "support" / "killed_runs.py")
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), "20", "1"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
        check=False,
    )
    print(done.stdout)
    lines = done.stdout.splitlines()
    assert [line.endswith("bit for bit") for line in lines] == [True] * 20, done.stdout
    assert done.returncode == 0
    assert sum("resumed at  0" not in line for line in lines) >= 12, (
        "most kills came before any save"
    )
