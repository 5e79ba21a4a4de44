"""The variance study of ELBOs: the same noise lowers the spread of differences, and the files are written."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "masked"
sys.path.insert(0, str(SCRIPTS))
import elbo_variance as study  # noqa: E402

sys.path.remove(str(SCRIPTS))


def test_the_spread_is_over_draws_and_its_mean_over_responses():
    values_DB = torch.tensor([[0.0, 10.0], [2.0, 10.0], [4.0, 10.0]], dtype=torch.float64)
    assert study.spread(values_DB) == pytest.approx(2**0.5)


def test_texts_repeat_their_prompt():
    rollout = study.texts(5, 7, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(rollout.responses_BT[:, :4], rollout.tokens_BL[:, :4])
    assert torch.equal(rollout.responses_BT[:, 4:], rollout.responses_BT[:, :-4])
    mixed = study.texts(500, 7, 0.2, torch.Generator().manual_seed(0))
    changed = mixed.responses_BT != mixed.tokens_BL[:, :4].repeat(1, 8)
    assert 0.15 < changed.float().mean() < 0.19  # a random letter may be the same


def test_the_same_noise_lowers_the_spread_of_differences(tmp_path, capsys, monkeypatch):
    """Of pairs, whose terms differ much in weight, also for a policy that has hardly learnt."""
    monkeypatch.setattr(study, "PASSES", (2,))
    options = ["--steps", "10", "--later", "2", "--rows", "3", "--draws", "6"]
    study.main(["--out", str(tmp_path), *options])
    rows = list(csv.DictReader((tmp_path / "elbo_variance.csv").open()))
    assert [row["estimator"] for row in rows] == ["single masks", "pairs"]
    assert float(rows[1]["same noise"]) < 0.5 * float(rows[1]["independent noise"])
    assert (tmp_path / "elbo_variance.png").stat().st_size > 5_000
    assert len(capsys.readouterr().out.splitlines()) == 2
