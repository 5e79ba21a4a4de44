"""Two processes with half of the rows each train a masked policy as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_mpo.policies import TinyMaskedPolicy
from tests.support.runs import distance, make_policy
from tests.support.two_processes import run_script
from tests.support.two_ranks_masked import CASES, train, warm_up

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_script("two_ranks_masked.py", folder)
    return folder


def start() -> dict[str, torch.Tensor]:
    policy = make_policy(TinyMaskedPolicy)
    policy.build(device=torch.device("cpu"), reference=False)
    return {name: weight.detach() for name, weight in policy.named_parameters()}


def check_ranks(two: Path, name: str, single: dict[str, torch.Tensor]) -> None:
    assert distance(single, start()) > 1e-3, "nothing was learnt"
    for rank in (0, 1):
        assert distance(torch.load(two / f"{name}-{rank}.pt"), single) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one(tmp_path, two, case):
    single = train(tmp_path, case, 1)
    check_ranks(two, case, single.weights)
    logged = json.loads((two / "rank0.json").read_text())[case]
    assert len(logged) == 6
    for (step, line), (other, expected) in zip(logged, single.record.without_clocks(), strict=True):
        assert step == other
        assert line == pytest.approx(expected, rel=2e-3, abs=1e-5)
    assert len({line["reward/mean"] for _, line in logged}) > 1


def test_two_ranks_are_one_in_the_supervised_stage(tmp_path, two):
    check_ranks(two, "stage", warm_up(tmp_path, 1))
