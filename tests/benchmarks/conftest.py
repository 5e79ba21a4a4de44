"""Fixtures that several files of this folder use."""

from __future__ import annotations

import gzip
import json

import pytest

from lightning_mpo.policies import ParallelHeads
from tests.support.mpo_checkpoints import write_checkpoint
from tests.support.mpo_scripts import freeze
from tests.support.rlpt_problems import CHARACTERS, GSM8K, HUMANEVAL, SVAMP
from tests.support.runs import Digits


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("policy") / "start.ckpt", ParallelHeads(offsets=2)
    )


@pytest.fixture(scope="session")
def frozen_path(checkpoint, tmp_path_factory):
    """A rollout of 8 prompts x 4 completions, frozen; graded rewards, as an untrained policy adds nothing up."""
    path = tmp_path_factory.mktemp("frozen") / "frozen.safetensors"
    options = [
        "--prompts",
        "8",
        "--completions",
        "4",
        "--max-new-tokens",
        "10",
        "--learning-rate",
        "0.01",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freeze, "ExactAnswer", Digits)
        freeze.main(["--checkpoint", checkpoint, "--out", str(path), *options])
    return path


@pytest.fixture(scope="module")
def problem_files(tmp_path_factory):
    plain_folder = tmp_path_factory.mktemp("data")
    (plain_folder / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, GSM8K)))
    (plain_folder / "svamp.json").write_text(json.dumps(SVAMP))
    with gzip.open(plain_folder / "humaneval.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, HUMANEVAL)))
    return plain_folder


@pytest.fixture(scope="module")
def plain_policy(tiny_policy):
    return tiny_policy(characters=CHARACTERS, max_length=512)
