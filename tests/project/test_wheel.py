"""The wheel in a fresh environment, in an empty folder outside of any checkout: what a reader of the README does first.

python -m pytest -m slow -s tests/project/test_wheel.py      prints the commands, what they answer, and the seconds they take
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

from tests.support.readme import BLOCKS
from tests.support.wheels import copied, wheel

SMALL = """\
# Seconds instead of minutes.
rollout:
  rewards: [my_module.EndsWithTarget]
  prompts: 4
  completions: 2
  minibatches: 2
  epochs: 1
  max_new_tokens: 12
trainer:
  max_steps: 2
  limit_val_batches: 0
  enable_progress_bar: false
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {dirpath: runs/quickstart/checkpoints, save_last: true, enable_version_counter: false}
"""
FIRST = "include: quickstart_warmup\ntrainer: {max_steps: 2, enable_progress_bar: false}\n"


class Installed:
    """A fresh environment with the wheel and, behind it, the packages that the tests run with."""

    def __init__(self, folder: Path) -> None:
        source = folder / "source"
        source.mkdir()
        made = wheel(copied(source), folder)
        self.here, self.bin = folder / "empty", folder / "venv" / "bin"
        self.here.mkdir()
        venv.create(folder / "venv", symlinks=True)
        python = self.bin / "python"
        packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
        (packages / "tested.pth").write_text(
            sysconfig.get_path("purelib") + "\n"
        )  # its own .pth files are not read
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            made,
        ]
        subprocess.run([str(word) for word in pip], check=True, capture_output=True)

    def call(self, *words: str, program: str = "lightning-mpo") -> str:
        """Run a command in the empty folder; return what it prints."""
        started = time.perf_counter()
        hidden = ("PYTHONPATH", "PYTHONSAFEPATH", "COLUMNS")
        environment = {key: value for key, value in os.environ.items() if key not in hidden} | {
            "OMP_NUM_THREADS": "1"
        }
        done = subprocess.run(
            [str(self.bin / program), *words],
            cwd=self.here,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
        answer = [line for line in done.stdout.splitlines() if line.strip()]
        print(f"{time.perf_counter() - started:5.1f} s  {program} {' '.join(words)[:90]}")
        print(f"         {answer[-1][:100] if answer else ''}")
        assert "Traceback" not in done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_package_comes_from_the_wheel(installed: Installed) -> None:
    code = "import lightning_mpo.callbacks as c, lightning_mpo as m; print(m.__file__, c.__file__, m.recipes.FOLDER)"
    places = installed.call(
        "-c", code.replace("as m;", "as m, lightning_mpo.recipes;"), program="python"
    ).split()
    assert len(places) == 3
    assert all(Path(place).is_relative_to(installed.bin.parent) for place in places), places


@pytest.mark.slow
def test_recipes_are_listed_written_out_run_and_used(installed: Installed) -> None:
    here = installed.here
    assert "quickstart" in installed.call("configs")
    assert "| [grpo](configs/algorithm/grpo.yaml)" in installed.call("methods")
    assert "rollout" in installed.call("plan", "-c", "quickstart", "-c", "grpo")
    installed.call("configs", "copy", "quickstart", "mine.yaml")
    assert "configs/experiment/quickstart_warmup.yaml" in installed.call(
        "configs", "copy", "quickstart"
    )

    # a run of a few updates, with a warm-up of a few more and the README's reward beside it
    mine = here / "mine.yaml"
    mine.write_text(mine.read_text().replace("experiment/quickstart_warmup", "first.yaml"))
    (here / "first.yaml").write_text(FIRST)
    (here / "small.yaml").write_text(SMALL)
    (here / "my_module.py").write_text(
        next(block for block in BLOCKS if "class EndsWithTarget" in block)
    )
    shown = installed.call("fit", "-c", "mine.yaml", "-c", "small.yaml")
    assert "is missing: fitting first.yaml first" in shown
    checkpoint = here / "runs" / "quickstart" / "checkpoints" / "last.ckpt"
    assert checkpoint.is_file()
    copy = "configs/experiment/quickstart.yaml"
    installed.call(
        "fit", "-c", "quickstart", "-c", "gspo", "-c", "small.yaml"
    )  # the warm-up is there
    assert "max_steps: 2" in installed.call("fit", "-c", copy, "-c", "small.yaml", "--print_config")

    # what came of it
    (here / "prompts.jsonl").write_text('{"prompt": "484+338="}\n')
    installed.call(
        "export",
        "-c",
        "mine.yaml",
        "-c",
        "small.yaml",
        "--checkpoint",
        str(checkpoint),
        "--to",
        "exported",
    )
    assert "mpo_backbone_rlpt" in (here / "exported" / "README.md").read_text(), (
        "the recipes are there"
    )
    installed.call(
        "predict", "--model", "exported", "--data", "prompts.jsonl", "--max_new_tokens", "8"
    )
    (written,) = here.rglob("predictions.jsonl")
    assert json.loads(written.read_text().splitlines()[0])["prompt"] == "484+338="
    use = (
        "--ckpt_path",
        str(checkpoint),
        "--rollout.max_new_tokens",
        "8",
        "--trainer.enable_progress_bar",
        "false",
    )
    installed.call("predict", "-c", "quickstart", "-c", "data/prompts", *use)
