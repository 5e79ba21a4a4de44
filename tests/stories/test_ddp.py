"""N ranks with 1/N of the prompts each are one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_mpo.policies import ValueHead
from tests.support.runs import distance, fit, make_policy, sgd
from tests.support.two_processes import run_script
from tests.support.two_ranks import CASES, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_script("two_ranks.py", folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one(tmp_path, two, case):
    single = train(tmp_path, case, 1)
    weights = [torch.load(two / f"{case}-{rank}.pt") for rank in (0, 1)]
    start = fit(
        tmp_path,
        policy=make_policy(critic=ValueHead()),
        max_steps=1,
        module={"optimizer": sgd(0.0)},
    ).weights
    assert bool(single.weights["critic.head.0.weight"].any()) == (case == "ppo")
    assert distance(single.weights, start) > 1e-3
    for rank in (0, 1):
        assert distance(weights[rank], single.weights) < 2e-6
    logged = json.loads((two / "rank0.json").read_text())[case]
    assert len(logged) == 6
    for (step, line), (other, expected) in zip(logged, single.record.without_clocks(), strict=True):
        assert step == other
        assert line == pytest.approx(expected, rel=2e-3, abs=1e-5)
    assert len({line["reward/mean"] for _, line in logged}) == 3


def test_each_rank_goes_on_with_its_own_rollout(two):
    said = [json.loads((two / f"rank{rank}.json").read_text())["resume"] for rank in (0, 1)]
    assert [part["off"] for part in said] == [0.0, 0.0]
    assert said[0]["rows"] == said[0]["expected"]
    assert said[1]["rows"] == said[1]["expected"]
    assert said[0]["rows"] != said[1]["rows"], (
        "both ranks had the same rows: the test shows nothing"
    )


def test_ranks_fill_their_rollouts_in_the_same_number_of_rounds(two):
    said = [json.loads((two / f"rank{rank}.json").read_text())["dynamic"] for rank in (0, 1)]
    accounts = list(zip(*(part["accounts"] for part in said), strict=True))
    assert len(accounts) == 4
    assert all(first["rollout/rounds"] == second["rollout/rounds"] for first, second in accounts)
    assert any(first != second for first, second in accounts)
    assert any(first["rollout/rounds"] > 1 for first, _ in accounts), (
        "no place was filled: the test shows nothing"
    )
    for (_, line), (first, second) in zip(said[0]["logged"][::2], accounts, strict=True):
        for name in first:
            if name.startswith("rollout/groups") or name == "rollout/tokens_dropped":
                assert line[name] == first[name] + second[name], name
        assert line["rollout/rounds"] == first["rollout/rounds"]
    assert said[0]["weights"] == said[1]["weights"]
    assert [part["off"] for part in said] == [0.0, 0.0]
