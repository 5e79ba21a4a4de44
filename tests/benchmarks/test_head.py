"""The benchmark of the heads: what is compared with what, and which bounds hold."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location(
    "head_benchmark", ROOT / "benchmarks" / "head.py"
)
assert specification is not None
assert specification.loader is not None
head = importlib.util.module_from_spec(specification)
specification.loader.exec_module(head)


def measured(variant, V, K, seconds, peak):
    return {"variant": variant, "V": V, "K": K, "D": 576, "seconds": seconds, "peak_mb": peak}


ROUNDS = [
    [
        measured("support", 32_000, 32, 1.2, 50),
        measured("support", 152_000, 32, 1.0, 40),
        measured("chunked", 152_000, 8, 20.0, 200),
        measured("logits", 152_000, 8, 50.0, 1000),
    ],
    [measured("support", 32_000, 32, 0.5, 60), measured("support", 152_000, 32, 1.1, 45)],
]


def test_ratios_are_of_the_least_times_and_the_bounds_are_named():
    small, large = head.compare(head.best(ROUNDS))
    assert (small["V"], small["support s"], small["support MB"], small["logits s"]) == (
        32_000,
        0.5,
        50,
        None,
    )
    assert large["chunked / support, time"] == 20
    assert large["logits / support, time"] == 50
    assert large["support / logits, memory"] == pytest.approx(0.04)
    said = head.verdicts([small, large])
    assert [line.rpartition(" ")[2] for line in said] == [
        "missed",
        "reached",
        "reached",
        "missed",
        "reached",
    ]
    assert "2.000" in said[3]  # 1.0 s against 0.5 s
    assert head.table([small, large]).count("\n") == 3


@pytest.mark.slow
def test_a_small_grid_runs_to_its_table_and_picture(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "head.py"),
        "--vocabularies",
        "50",
        "80",
        "--sizes",
        "4",
    ]
    command += [
        "--widths",
        "16",
        "--tokens",
        "30",
        "--repeats",
        "1",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "| 16 | 4 | 80 |" in done.stdout
    cells = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [cell["variant"] for cell in cells] == [*head.VARIANTS, *head.VARIANTS]
    assert all(cell["seconds"] > 0 for cell in cells)
    assert {"head.md", "head.csv", "head.png"} == {path.name for path in tmp_path.iterdir()}
