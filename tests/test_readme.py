"""The README's examples run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lightning_mpo.action_spaces import TokenActions
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.rewards import Completion

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.fixture(scope="module")
def examples() -> dict:
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    return names


def completion(text: str) -> Completion:
    return Completion(prompt="", text=text, target="4", tokens=1, finished=True, row={})


def test_there_are_three_examples() -> None:
    assert len(BLOCKS) == 3


def test_the_reward(examples: dict) -> None:
    assert examples["EndsWithTarget"]().score([completion("2+2=4 "), completion("5")]) == [1.0, 0.0]


def test_the_action_space(examples: dict) -> None:
    ratios_BT = torch.tensor([[0.1, 0.3, 0.5, 0.0]])
    mask_BT = torch.tensor([[True, True, True, False]])
    actions = examples["Pairs"]().actions(ratios_BT, torch.ones(1, 4), mask_BT)
    torch.testing.assert_close(actions.log_ratios_BU[actions.mask_BU], torch.tensor([0.2, 0.5]))
    assert actions.weights_BU[actions.mask_BU].tolist() == [2.0, 1.0]
    assert TokenActions().weights(mask_BT).sum() == actions.weights_BU.sum()


def test_the_data_module(examples: dict) -> None:
    data = examples["Doubling"](chat_template=False)
    data.connect(TinyPolicy("0123456789+=;").tokenizer)
    batch = data.prompts(0, 4)
    assert all(row.target == str(2 * int(row.prompt.split("+")[0])) for row in batch.rows)
    assert len({row.prompt for row in data.training_rows(0, 90)}) == 90


@pytest.mark.parametrize("path", re.findall(r"configs/\w+/\w+\.yaml", README.read_text()))
def test_named_files_exist(path: str) -> None:
    assert (README.parent / path).is_file()
