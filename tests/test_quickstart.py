"""The README's claim, on one seed and fewer held-out problems: the quickstart learns, and does not at learning rate 0."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SMALL = """\
# The quickstart with a smaller report and no progress bar.
trainer:
  enable_progress_bar: false
  logger: false
  callbacks:
    - {class_path: Report, init_args: {problems: 300, completions: 4, initial: warmup}}
"""


def fit(folder: Path, *options: str) -> dict[str, Any]:
    """Run the quickstart in a folder of its own and return what it summed up."""
    (folder / "small.yaml").write_text(SMALL)
    command = [sys.executable, "-m", "lightning_mpo", "fit", "-c", "configs/experiment/quickstart.yaml"]
    subprocess.run([*command, "-c", "small.yaml", *options], cwd=folder, check=True, timeout=1500)
    return json.loads((folder / "runs" / "quickstart" / "summary.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.mark.slow
def test_the_quickstart_learns(folder: Path) -> None:
    summary = fit(folder)
    before, after = summary["warmup"], summary["final"]
    assert after["pass@1"] >= before["pass@1"] + 0.2
    assert after["support pass@1"] >= before["support pass@1"] + 0.2
    assert after["greedy accuracy"] >= before["greedy accuracy"] - 0.03
    assert after["clip_fraction"] > 0
    assert (folder / "runs" / "quickstart" / "learning_curve.png").stat().st_size > 10_000


@pytest.mark.slow
def test_at_learning_rate_0_it_gains_nothing(folder: Path) -> None:
    """Runs on the warm-up checkpoint of the test above, or makes one."""
    lr = "--model.init_args.scheduler.init_args.max_lr=0.0"
    summary = fit(folder, lr, "--model.init_args.optimizer.init_args.lr=0.0", "--trainer.max_steps=16")
    before, after = summary["warmup"], summary["final"]
    assert abs(after["pass@1"] - before["pass@1"]) < 0.03
    assert 0.2 < before["pass@1"] < 0.8, "a warm-up that leaves room both ways"


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["ddp", "fsdp"])
def test_two_processes_learn_it_as_one_does(folder: Path, hardware: str) -> None:
    two = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.precision=32-true"]
    summary = fit(folder, "-c", f"configs/hardware/{hardware}.yaml", *two)
    before, after = summary["warmup"], summary["final"]
    assert summary["updates"] == 160
    assert after["pass@1"] >= before["pass@1"] + 0.2
    assert after["greedy accuracy"] >= before["greedy accuracy"] - 0.03
