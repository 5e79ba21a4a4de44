"""Lanes of a study: their runs are forks of one process, and equal runs in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.study_scripts import lanes

ROOT = Path(__file__).parents[2]
ECHO = """
import json, sys
for line in sys.stdin:
    job = json.loads(line)
    if job["arguments"] == ["end"]:
        break
    print(len(job["arguments"]), flush=True)
"""


@pytest.fixture
def started(monkeypatch):
    """Counts the servers, which answer with the number of arguments."""
    servers = []

    def start(lane):
        command = [sys.executable, "-c", ECHO]
        servers.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        return servers[-1]

    monkeypatch.setattr(lanes.Lane, "_start", start)
    return servers


def test_a_lane_has_one_process_and_starts_it_again_if_it_ends(started, tmp_path):
    lane = lanes.Lane(1)
    assert lane.fit(["a", "b"], tmp_path / "x" / "run.log") == 2
    assert lane.fit([], tmp_path / "run.log") == 0
    assert len(started) == 1
    assert lane.fit(["end"], tmp_path / "run.log") == 1
    assert lane.fit(["a"], tmp_path / "run.log") == 1
    assert len(started) == 2
    lane.close()
    assert [server.poll() for server in started] == [0, 0]


def test_jobs_begin_in_their_order_and_an_error_ends_the_lanes(started, tmp_path):
    done = []
    jobs = [lambda fit, i=i: done.append(fit([str(i)] * i, tmp_path / "log")) for i in range(4)]
    lanes.work(jobs, 1, 1)
    assert done == [0, 1, 2, 3]

    def fail(fit):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        lanes.work([fail, *jobs], 1, 1)
    assert done == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_forked_run_equals_a_run_of_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [
        *("fit", "-c", "micro", "-c", "arithmetic", "-c", "benchmarks/studies/verdict/base.yaml"),
        *("-c", "benchmarks/studies/ppo_mpo.yaml", "--seed_everything", "3"),
        *("--trainer.max_steps", "8", "--trainer.val_check_interval", "4"),
        *("--data.init_args.validation_prompts", "8", "--rollout.prompts", "4"),
        *("--rollout.max_new_tokens", "12"),
    ]
    lane = lanes.Lane(1)
    folders = [tmp_path / name for name in ("forked", "again", "fresh")]
    for folder in folders[:2]:
        command = [*arguments, "--trainer.default_root_dir", str(folder)]
        assert lane.fit(command, folder / "run.log") == 0
    lane.close()
    command = [sys.executable, "-m", "lightning_mpo", *arguments]
    command += ["--trainer.default_root_dir", str(folders[2])]
    subprocess.run(command, check=True, capture_output=True)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    for summary in summaries:
        del summary["seconds"], summary["peak_rss_mb"]
    assert summaries[0] == summaries[1] == summaries[2]
