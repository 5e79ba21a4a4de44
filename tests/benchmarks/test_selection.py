"""The benchmark of sampled tokens: what is compared with what, which bounds hold, and that the gradient is the same."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_mpo.objective.selection import SampledTokens
from tests.support.builders import relative_error, seeded
from tests.support.head_options import full_logprobs

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location(
    "selection_benchmark", ROOT / "benchmarks" / "selection.py"
)
assert specification is not None
assert specification.loader is not None
selection = importlib.util.module_from_spec(specification)
specification.loader.exec_module(selection)


def measured(variant, V, seconds, peak):
    return {"variant": variant, "V": V, "D": 576, "seconds": seconds, "peak_mb": peak}


def test_ratios_are_of_the_least_times_and_the_bounds_are_named():
    cells = [
        measured("all", 100, 10.0, 50),
        measured("sampled", 100, 4.4, 60),
        measured("logits", 100, 20.0, 500),
        measured("all", 100, 12.0, 70),
        measured("sampled", 100, 4.0, 50),
        measured("all", 200, 10.0, 50),
        measured("sampled", 200, 5.0, 51),
    ]
    small, large = selection.compare(cells)
    assert small["sampled / all, time"] == pytest.approx(0.4)
    assert small["sampled / all, memory"] == 1
    assert small["sampled / logits, time"] == pytest.approx(0.2)
    assert small["sampled / logits, memory"] == pytest.approx(0.1)
    assert (large["logits s"], large["sampled / logits, time"]) == (None, None)
    surrogates = [
        {"surrogate": "A", "microseconds": 1.0, "share of a step": 1e-8},
        {"surrogate": "B", "microseconds": 1e6, "share of a step": 0.03},
    ]
    said = selection.verdicts([small, large], surrogates)
    assert [line.rpartition(" ")[2] for line in said] == [
        "reached",
        "reached",
        "missed",
        "missed",
        "missed",
    ]
    assert said[-1].startswith("dearest surrogate B")
    assert selection.verdicts([], surrogates[:1])[0].endswith("reached")


def test_the_gradient_of_a_part_is_that_of_all_tokens_with_no_loss_on_the_rest():
    T, D, V = 40, 16, 50
    hidden, weight = (
        torch.randn(1, T, D, generator=seeded(0)),
        torch.randn(V, D, generator=seeded(1)),
    )
    tokens, upstream = (
        torch.randint(0, V, (1, T), generator=seeded(2)),
        torch.randn(1, T, generator=seeded(3)),
    )
    mask = (
        SampledTokens(prefix=0, cap=None, probability=0.4).choose(
            torch.ones(1, T, dtype=torch.bool), seeded(4)
        )
        > 0
    )
    assert 0 < mask.sum() < T
    gradients = []
    for given in (mask, None):
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs = full_logprobs(states, head, tokens, mask_BT=given, entropy=False, chunk_size=7)[
            0
        ]
        gradients.append(torch.autograd.grad((logprobs * upstream * mask).sum(), (states, head)))
    for part, whole in zip(*gradients, strict=True):
        assert relative_error(part, whole) < 1e-6
    assert not gradients[0][0][~mask].any()


def test_every_surrogate_is_measured():
    from lightning_mpo.objective.surrogates import Surrogate
    from tests.support.builders import subclasses

    names = {row["surrogate"].split("(")[0] for row in selection.measure_surrogates(1)}
    assert names == {found.__name__ for found in subclasses(Surrogate)}


@pytest.mark.slow
def test_a_small_grid_runs_to_its_tables(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "selection.py"),
        "--vocabularies",
        "50",
        "--widths",
        "16",
    ]
    command += [
        "--tokens",
        "30",
        "--repeats",
        "1",
        "--rounds",
        "1",
        "--surrogate-repeats",
        "1",
        "--out",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    cells = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [cell["variant"] for cell in cells] == list(selection.VARIANTS)
    assert all(cell["seconds"] > 0 for cell in cells)
    assert {"selection.md", "selection.csv", "surrogates.csv"} == {
        path.name for path in tmp_path.iterdir()
    }
    (row,) = csv.DictReader((tmp_path / "selection.csv").open())
    assert float(row["sampled / all, time"]) == pytest.approx(
        float(row["sampled s"]) / float(row["all s"])
    )
