"""The configurations of the page on diffusion, with a small model: the stage, the run and its plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_mpo import cli
from lightning_mpo.cli import plan
from tests.support.masked_folders import write_family
from tests.support.pages import ROOT, blocks

PAGE = ROOT / "docs" / "diffusion.md"
ROW = '{"prompt": "12+12=", "solution": "24", "target": "24"}'
SMALLER = {
    "answerdotai/ModernBERT-base": "model",
    "canvas: 256": "canvas: 8",
    "max_new_tokens: 256": "max_new_tokens: 8",
    "block: 32, tokens_per_step: 2": "block: 4, tokens_per_step: 2",
    "max_steps: 1000": "max_steps: 2",
    "max_steps: 200": "max_steps: 1",
    "prompts: 8": "prompts: 2",
    "completions: 8": "completions: 4",
}


def smaller(text: str) -> str:
    """Return the configuration of a smaller run, of the model in `model`."""
    for old, new in SMALLER.items():
        text = text.replace(old, new)
    return text


def test_the_likelihood_of_the_stage_is_that_of_the_recipe():
    recipe = yaml.safe_load((ROOT / "configs/experiment/diffusion_warmup.yaml").read_text())
    stage = yaml.safe_load(blocks(PAGE, "yaml")[0])["model"]
    assert stage["class_path"] == recipe["model"]["class_path"]
    likelihood = stage["init_args"]["likelihood"]
    assert likelihood == recipe["model"]["init_args"]["likelihood"]


@pytest.mark.slow
def test_a_run_of_your_own_trains(tmp_path, monkeypatch, capsys):
    """The run starts the stage first, and the plan takes the same file."""
    monkeypatch.chdir(tmp_path)
    page, (_, stage, run) = PAGE.read_text(), blocks(PAGE, "yaml")
    assert f"`{ROW}`" in page
    assert all(old in stage + run for old in SMALLER)
    Path("train.jsonl").write_text(f"{ROW}\n")
    write_family("modernbert", Path("model"))
    for name, text in (("my_warmup", stage), ("my_run", run)):
        assert f"`{name}.yaml`" in page
        Path(f"{name}.yaml").write_text(smaller(text))
    assert plan.main(["-c", "my_run.yaml", "--gpu-gib", "24"]) == 0
    assert "each in 4 noised copies in one row" in capsys.readouterr().out
    assert not cli.run(["fit", "-c", "my_run.yaml"])
    assert Path("runs/mine/warmup/last.ckpt").is_file()
    assert Path("runs/mine/checkpoints/last.ckpt").is_file()
    assert "reward/mean" in Path("runs/mine/metrics.csv").read_text().splitlines()[0]
