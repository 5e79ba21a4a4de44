"""Runs on scaffolds: one that was stopped goes on bit for bit, and two processes are one."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.support.runs import adam, distance, same
from tests.support.two_processes import run_script
from tests.support.two_ranks_scaffolded import train

KINDS = ("reward/level", "reward/accuracy_level", "rollout/groups_flat_level")


def by_level(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith(KINDS)}


@pytest.mark.parametrize("at", [3, 4], ids=["within a rollout", "between two"])
def test_a_run_on_scaffolds_goes_on_bit_for_bit(tmp_path, at):
    module = {"optimizer": adam(3e-3)}
    save = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    whole = train(tmp_path / "whole", module=module, callbacks=[save])
    resumed = train(tmp_path / "resumed", module=module, ckpt_path=f"{tmp_path}/step={at}.ckpt")
    assert same(resumed.weights, whole.weights)
    lines = [line for line in whole.record.without_clocks() if line[0] >= at]
    assert resumed.record.without_clocks() == lines
    assert len({name for _, line in lines for name in by_level(line)}) > 3, "few levels were drawn"


@pytest.mark.slow
def test_two_processes_on_scaffolds_are_one(tmp_path):
    run_script("two_ranks_scaffolded.py", tmp_path)
    single = train(tmp_path / "one")
    for rank in (0, 1):
        assert distance(torch.load(tmp_path / f"weights-{rank}.pt"), single.weights) < 2e-6
    logged = json.loads((tmp_path / "lines-0.json").read_text())
    seen = {name for _, line in logged for name in by_level(line)}
    assert seen == {f"{kind}_{level}" for kind in KINDS for level in range(3)}
    for (step, line), (other, expected) in zip(logged, single.record.without_clocks(), strict=True):
        assert step == other
        assert by_level(line).keys() == by_level(expected).keys()
        assert line == pytest.approx(expected, rel=2e-3, abs=1e-5)
    flat = {line[name] for _, line in logged for name in line if "flat_level" in name}
    assert len(flat) > 1, "all groups were alike: the test shows nothing"
