"""The examples of the README and of the pages for users run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_mpo import recipes
from lightning_mpo.objective.action_spaces import TokenActions
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.rewards import Completion
from tests.support.configurations import BASE
from tests.support.readme import BLOCKS, README, TEXTS

RUN = next(block for block in BLOCKS if "trainer.fit" in block)
LOOP = next(block for block in BLOCKS if "loss.backward()" in block)
FENCED = [
    fence for text in TEXTS for fence in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
]
NAMES = {
    name for kind, block in FENCED if not kind for name in re.findall(r"-c ([\w/]+)(?=\s)", block)
} - {"NAME"}


@pytest.fixture(scope="module")
def examples() -> dict:
    names: dict = {}
    for block in BLOCKS:
        if block in (RUN, LOOP):
            continue
        exec(compile(block, str(README), "exec"), names)
    return names


def completion(text: str) -> Completion:
    return Completion(prompt="", text=text, target="4", tokens=1, finished=True, row={})


def test_there_are_seven_examples() -> None:
    assert len(BLOCKS) == 7
    assert RUN in TEXTS[0]
    assert len(RUN.splitlines()) <= 20


def test_the_run_from_python_learns(tmp_path, monkeypatch, capsys) -> None:
    """An untrained policy writes a seven 0.6 times in eight tokens; the last rollout is above half by a wide margin."""
    monkeypatch.chdir(tmp_path)
    exec(compile(RUN, str(README), "exec"), {})
    reward = float(capsys.readouterr().out.rsplit(":", 1)[1])
    assert reward > 0.5
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_loop_without_a_trainer_learns(capsys) -> None:
    """The same reward as in the run from Python: untrained 0.08, at the end close to 1."""
    assert "Trainer" not in LOOP
    exec(compile(LOOP, str(README), "exec"), {})
    assert float(capsys.readouterr().out.rsplit(":", 1)[1]) > 0.5


def test_the_named_recipes_exist() -> None:
    assert {"quickstart", "gspo", "rlpt"} <= NAMES
    for name in NAMES:
        assert recipes.name_of(recipes.find(name)), name


def test_the_function_trains_from_another_folder(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def ends_with_target(completions, target, **columns):\n"
        "    return [float(text.strip().endswith(right)) for text, right in zip(completions, target)]\n"
    )
    reward = "{class_path: FunctionReward, init_args: {function: 'my_rewards.py:ends_with_target', accuracy: true}}"
    (tmp_path / "base.yaml").write_text(BASE.replace("[ExactAnswer]", f"[{reward}]"))
    command = [
        sys.executable,
        "-m",
        "lightning_mpo",
        "fit",
        "-c",
        "base.yaml",
        "--trainer.log_every_n_steps",
        "1",
    ]
    paths = {"PYTHONPATH": f"{README.parent}:{os.environ.get('PYTHONPATH', '')}"}
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "ends_with_target" in (tmp_path / "run" / "metrics.csv").read_text()


def test_the_reward(examples: dict) -> None:
    judged = examples["ends_with_target"](["2+2=4 ", "5"], ["4", "4"], prompt=["", ""])
    assert judged == [1.0, 0.0]
    assert examples["EndsWithTarget"]().score([completion("2+2=4 "), completion("5")]) == [1.0, 0.0]


def test_the_action_space(examples: dict) -> None:
    ratios_BT = torch.tensor([[0.1, 0.3, 0.5, 0.0]])
    mask_BT = torch.tensor([[True, True, True, False]])
    actions = examples["Pairs"]().actions(ratios_BT, torch.ones(1, 4), mask_BT)
    torch.testing.assert_close(actions.log_ratios_BU[actions.mask_BU], torch.tensor([0.2, 0.5]))
    assert actions.weights_BU[actions.mask_BU].tolist() == [2.0, 1.0]
    assert TokenActions().token_counts(mask_BT).sum() == actions.weights_BU.sum()


def test_the_data_module(examples: dict) -> None:
    data = examples["Doubling"](chat_template=False)
    data.connect(TinyPolicy("0123456789+=;").tokenizer)
    batch = data.prompts(0, 4)
    assert all(row.target == str(2 * int(row.prompt.split("+")[0])) for row in batch.rows)
    assert len({row.prompt for row in data.training_rows(0, 90)}) == 90


def test_every_recipe_is_in_the_readme() -> None:
    """By its name, under the kind that its folder is; those of data are on the page of data."""
    text = README.read_text().partition("## Recipes")[2].partition("\n## ")[0]
    page = (README.parent / "docs" / "data.md").read_text()
    text += page.partition("## Data sets of the package")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`", text))
    files = {path.stem for path in recipes.FOLDER.rglob("*.yaml")}
    stages = {name for name in files if name.endswith(("_warmup", "_stage"))}
    assert files - stages - listed == set()
    assert len(files - stages) > 40


def test_named_files_exist() -> None:
    links = re.findall(r"\]\(([\w/.]+)\)|(configs/\w+/\w+\.yaml)", README.read_text())
    assert {"docs/methods.md", "RESULTS.md"} <= {link for link, _ in links}
    assert all((README.parent / (link or path)).is_file() for link, path in links)
