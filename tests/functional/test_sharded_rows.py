"""Rows of a weight in two shards, on two real processes, against the weight in one piece."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.head_options import full_ranks, full_top_k
from tests.support.two_shards import problem, run, weights


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("shards")
    script = str(Path(__file__).parents[1] / "support" / "two_shards.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("empty", [False, True], ids=["busy", "idle"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", ["support", "full"])
def test_shards_give_the_values_and_mean_gradients_of_one_piece(ranks, kind, trained, empty):
    one = [weight.requires_grad_(trained) for weight in weights()]
    for rank in (0, 1):
        values = run(
            kind, rank, *one, empty=empty
        )  # gradients of weight and bias add up over the processes
        for mine, expected in zip(ranks[rank][kind, trained, empty], values, strict=False):
            torch.testing.assert_close(mine, expected)
    for rank in (0, 1):
        grads = ranks[rank][kind, trained, empty][3:]
        assert len(grads) == 2 * trained
        for mine, weight in zip(grads, one, strict=False):
            torch.testing.assert_close(mine, weight.grad / 2)


def test_ranks_and_the_top_k_are_those_of_one_piece(ranks):
    for rank in (0, 1):
        hidden, tokens, _ = problem(rank)
        expected = [full_ranks(hidden, weights()[0], tokens), full_top_k(hidden, weights()[0], 3)]
        assert all(map(torch.equal, ranks[rank]["ranks"], expected))


def test_each_process_gets_the_rows_it_asks_for(ranks):
    weight = weights()[0]
    assert torch.equal(ranks[0]["rows"][0], weight[[2, 7, 12]])
    assert torch.equal(ranks[1]["rows"][0], weight[[7]])
    assert torch.equal(ranks[1]["one"][0], weights(1)[0])


def test_other_layouts_are_refused(ranks):
    messages = ranks[0]["refused"]
    assert len(messages) == 2
    assert all(
        "must be sharded on dimension 0 over a one-dimensional mesh" in message
        for message in messages
    )
