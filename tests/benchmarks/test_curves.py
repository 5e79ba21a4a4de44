"""The curves of a run: values of its `metrics.csv`, their means, a picture, and a mistake."""

from __future__ import annotations

import sys

import pytest

from benchmarks import curves

ROWS = "step,reward/mean,rollout/length\n0,0.5,\n0,0.25,9\n1,,7\n2,0.75,8\n"


@pytest.fixture
def run(tmp_path):
    """A run's folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.csv").write_text(ROWS)
    return folder


def test_the_last_row_of_an_update_counts(run):
    values = curves.read(run / "metrics.csv")
    assert values["reward/mean"] == {0: 0.25, 2: 0.75}
    assert values["rollout/length"] == {0: 9, 1: 7, 2: 8}
    assert values["policy/entropy"] == {}


def test_means_are_over_the_last_values():
    assert curves.smooth([1.0, 3.0, 5.0, 9.0], window=2) == [1, 2, 4, 7]
    assert curves.smooth([1.0, 3.0], window=8) == [1, 2]


def test_a_picture_of_two_runs(run, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "new" / "curves.png"
    arguments = [str(run), str(run), "--names", "grpo", "rlpt", "--to", str(picture)]
    monkeypatch.setattr(sys, "argv", ["curves.py", *arguments])
    curves.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"curves of grpo, rlpt are in {picture}" in capsys.readouterr().out


def test_a_folder_without_metrics_is_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["curves.py", str(run), str(tmp_path)])
    with pytest.raises(SystemExit):
        curves.main()
    assert f"there is no {tmp_path / 'metrics.csv'}" in capsys.readouterr().err
