"""Two ranks have one reference, that of one process with the whole batch, and so they do after a resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.runs import distance, same
from tests.support.two_ranks_reference import KINDS, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_folder) -> tuple[Path, list[dict]]:
    """The folder of the checkpoints, and what each of two processes had."""
    folder = tmp_path_factory.mktemp("two")
    script = str(Path(__file__).parents[1] / "support" / "two_ranks_reference.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PL_")} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, script, str(folder), tiny_folder]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_have_the_reference_of_one(tmp_path, tiny_folder, two, kind):
    first, second = (said[kind][None] for said in two[1])
    assert same(first["reference"], second["reference"])
    assert same(first["policy"], second["policy"])
    single = train(tmp_path, tiny_folder, kind)
    for part in ("reference", "policy"):
        assert first[part].keys() == single[part].keys()
        assert all(weight.dtype == torch.float64 for weight in first[part].values())
        assert distance(first[part], single[part]) < 1e-6, part
    policy = {name: single["policy"][f"network.{name}"] for name in single["reference"]}
    assert distance(policy, single["reference"]) > 1e-3, (
        "the reference is the policy: the test shows nothing"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_go_on_with_the_reference_of_the_checkpoint(two, kind):
    folder, said = two
    kept = torch.load(folder / f"{kind}-step=3.ckpt", weights_only=True)["callbacks"][
        "ReferenceUpdate"
    ]
    assert kept["counter"] == 2
    for rank in (0, 1):
        whole, resumed = said[rank][kind][None], said[rank][kind][3]
        assert same(resumed["began"], kept["reference"])
        assert not same(resumed["began"], resumed["reference"]), (
            "it did not move again: the test shows nothing"
        )
        assert same(resumed["reference"], whole["reference"])
        assert same(resumed["policy"], whole["policy"])
