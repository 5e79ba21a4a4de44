"""Two processes, one of which is killed, go on as if neither had been, with shards too; a signal to one stops both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_mpo.resume.comparison import compare_runs
from lightning_mpo.storage import locate, read_checkpoint

pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).parents[1] / "support" / "two_ranks_killed.py")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PL_")} | {
    "OMP_NUM_THREADS": "1"
}


def run(
    folder: Path, phase: str = "none", count: int = 1, rank: int = 0, strategy: str = "ddp"
) -> int:
    command = [sys.executable, SCRIPT, str(folder), phase, str(count), str(rank), strategy]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT, check=False
    )
    assert done.returncode <= 0 or phase != "none", done.stderr[-3000:]
    return done.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return folder


@pytest.mark.parametrize(("phase", "count", "rank"), [("micro-batch", 4, 1), ("update", 5, 0)])
def test_one_of_two_processes_is_killed(tmp_path, whole, phase, count, rank):
    assert run(tmp_path, phase, count, rank) != 0
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert run(tmp_path) == 0
    found = {part.part: part for part in compare_runs(whole, tmp_path)}
    assert [part.difference for part in found.values() if part.difference] == []
    assert found["random numbers"].count == 16, "of both processes"
    assert found["prompt order"].count == 2 * 4 * 2
    print(f"rank {rank} killed at {phase} {count}: {len(found)} parts bit for bit")


@pytest.fixture(scope="module")
def whole_in_shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, strategy="folder") == 0
    return folder


@pytest.mark.parametrize(
    ("phase", "count", "rank"),
    [("update", 5, 1), ("write", 10500, 1), ("rename", 5, 0)],
    ids=["update", "write", "aside"],
)
def test_one_of_two_processes_with_a_shard_each_is_killed(
    tmp_path, whole_in_shards, phase, count, rank
):
    assert run(tmp_path, phase, count, rank, "folder") != 0
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert locate(last).is_dir()
    assert (phase == "rename") == (locate(last) != last), "killed between the two renames"
    step = read_checkpoint(last, part="outline")["global_step"]
    assert 0 < step < 7
    assert run(tmp_path, strategy="folder") == 0
    found = {part.part: part for part in compare_runs(whole_in_shards, tmp_path)}
    assert [part.difference for part in found.values() if part.difference] == []
    assert found["random numbers"].count == 16, "of both processes"
    assert all(found[part].count for part in ("weights", "optimiser", "rollout buffer"))
    print(
        f"rank {rank} killed at {phase} {count}, resumed at {step}: {len(found)} parts bit for bit"
    )


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(tmp_path, whole):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, str(tmp_path), "none", "1", "0", "ddp"],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    while not (tmp_path / "rank1-prompts.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said[-3000:]
    assert "preempted  SIGTERM: saved" in said
    assert run(tmp_path) == 0
    assert [part.difference for part in compare_runs(whole, tmp_path) if part.difference] == []
