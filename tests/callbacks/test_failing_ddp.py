"""A reward that fails on one of two processes ends both, in one line that names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.configurations import BASE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CRASHES = """
import os
def crashes(completions):
    if os.environ.get("LOCAL_RANK") == "1":
        os._exit(3)
    return [float(i % 2) for i in range(len(completions))]
"""


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=200, cwd=folder, check=False,
        env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip


def test_both_processes_end_with_the_same_words(tmp_path: Path) -> None:
    done = launch(
        tmp_path, str(Path(__file__).parents[1] / "support" / "two_ranks_failing.py"), str(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"lines{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    code = Path(__file__).parents[1] / "support" / "two_ranks_failing.py"
    line = 1 + next(
        i for i, text in enumerate(code.read_text().splitlines()) if "raise ValueError" in text
    )
    at = f"({code}, line {line})"
    one = f"reward `Fails` raised ValueError: on 1 {at} (in process 1 of 2) True"
    assert first == {
        "none": "no error",
        "second process": one,
        "second rollout": "no error",  # the reward has worked once: its failures cost samples
        "first process": f"reward `Fails` raised ValueError: on 0 {at} (in process 0 of 2) True",
        "dynamic": one,
        "validation": "no error",
    }


def test_a_crash_in_a_helper_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "mine.py").write_text(CRASHES)
    done = launch(
        tmp_path, "-m", "lightning_mpo", "fit", "-c", "base.yaml", "--rollout.rewards", "[mine.crashes]",
        "--trainer.devices", "2", "--trainer.strategy", "ddp",
    )  # fmt: skip
    assert done.returncode == 2, (done.returncode, done.stderr[-3000:])
    lines = [line for line in done.stderr.splitlines() if "lightning-mpo: " in line]
    assert lines == [
        "lightning-mpo: reward `crashes` ended its process with exit code 3; a reward must return (in process 1 of 2)"
    ]
    assert "Traceback" not in done.stderr
    assert "closed by peer" not in done.stderr
