"""`MathAnswer` on the worked solutions of GSM8K: its own are right, and shifted by one are wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightning_mpo.rewards import Completion, MathAnswer


def solutions() -> list[str]:
    folder = os.environ.get("LIGHTNING_MPO_DATA") or Path(__file__).parents[3] / "shared" / "data"
    files = [Path(folder) / "gsm8k" / f"{part}.jsonl" for part in ("train", "test")]
    if not all(file.is_file() for file in files):
        pytest.skip(f"{files[0].parent} is absent; set LIGHTNING_MPO_DATA")
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [json.loads(line)["answer"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("extract", ["auto", "hashes"])
def test_own_solutions_are_right_and_shifted_ones_are_wrong(extract: str) -> None:
    reward, rows, shifted = MathAnswer(extract=extract), [], []
    for solution in solutions():
        steps, _, answer = solution.rpartition("####")
        other = int(answer.replace(",", "")) + 1
        rows.append(Completion("p", solution, answer.strip(), 9, True, {}))
        shifted.append(Completion("p", f"{steps}#### {other}", answer.strip(), 9, True, {}))
    assert len(rows) == 8792
    assert set(reward.score(rows)) == {1.0}
    assert set(reward.score(shifted)) == {0.0}
