"""The benchmark of memory against noised copies: its ratios, its bounds, its exit code and a small grid."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "masked" / "copies_memory.py"
specification = importlib.util.spec_from_file_location("copies_memory", SCRIPT)
assert specification is not None
assert specification.loader is not None
copies_memory = importlib.util.module_from_spec(specification)
specification.loader.exec_module(copies_memory)

MIB = 2**20


def measured(variant, peaks):
    return [{"variant": variant, "copies": n, "peak": peak * MIB} for n, peak in peaks.items()]


def test_the_most_copies_are_compared_with_the_fewest_and_bounds_are_named():
    cells = measured("Elbo", {2: 100, 16: 111}) + measured("CoupledElbo", {16: 119, 2: 100})
    cells += measured(copies_memory.CONTRAST, {2: 100, 8: 400})
    elbo, coupled, contrast = rows = copies_memory.compare(cells)
    assert elbo["most / fewest"] == pytest.approx(1.11)
    assert coupled["most / fewest"] == pytest.approx(1.19)
    assert (contrast["most / fewest"], contrast["bound"]) == (4, None)
    ends = [line.rpartition(" ")[2] for line in copies_memory.verdicts(rows)]
    assert ends == ["missed", "reached"]
    head, _, first, *_ = copies_memory.table(rows).splitlines()
    assert head.endswith("| 8 copies, MiB | most / fewest | bound |")
    assert first == "| Elbo | 100 | 111 |  | 1.11 | 1.1 |"


def test_an_objective_has_as_many_copies():
    for variant in ("Elbo", "Denoising", copies_memory.CONTRAST):
        objective = copies_memory.make_objective({"variant": variant, "copies": 8})
        assert objective.likelihood.repeats == 8
    objective = copies_memory.make_objective({"variant": "CoupledElbo", "copies": 8})
    assert (objective.likelihood.pairs, objective.likelihood.repeats) == (4, 1)


@pytest.mark.slow
def test_a_small_grid_runs_to_its_table_and_picture(tmp_path):
    sizes = ["--copies", "2", "4", "--canvas", "8", "--width", "64", "--layers", "1", "--rows", "2"]
    command = [sys.executable, str(SCRIPT), *sizes, "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--picture", str(tmp_path / "memory.png")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode in (0, 1), done.stderr
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".csv", ".png"}
    rows = list(csv.DictReader((tmp_path / "copies_memory.csv").open()))
    assert [(row["variant"], row["copies"]) for row in rows][:2] == [("Elbo", "2"), ("Elbo", "4")]
    assert all(int(row["peak"]) > int(row["weights"]) > 0 for row in rows)
