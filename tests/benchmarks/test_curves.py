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


def test_any_metric_can_be_read(run):
    assert curves.read(run / "metrics.csv", ["rollout/length"]) == {
        "rollout/length": {0: 9, 1: 7, 2: 8}
    }


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


def test_panels_are_the_metrics_that_are_given(run, tmp_path, monkeypatch, capsys):
    """A panel each, with room for negative values; a run may lack a metric, but not all runs."""
    from matplotlib.figure import Figure

    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.csv").write_text("step,reward/thinks,reward/x\n0,0.5,-2\n1,0.25,-1\n")
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    words = ["curves.py", str(run), str(other), "--metrics", "reward/mean", "reward/thinks"]
    monkeypatch.setattr(sys, "argv", [*words, "rollout/length", "reward/x"])
    curves.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["other: no values of reward/mean", "run: no values of reward/thinks"]
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels if axes.axison] == [
        *("reward", "share of responses that think", "length, tokens", "reward/x")
    ]
    assert panels[1].get_ylim()[0] == 0
    assert panels[3].get_ylim()[0] < -2
    assert [line.get_ydata()[0] for line in panels[3].lines if len(line.get_ydata())] == [-2, -2]
    monkeypatch.setattr(sys, "argv", [*words, "reward/oops"])
    with pytest.raises(SystemExit):
        curves.main()
    assert "no run has the metric reward/oops" in capsys.readouterr().err


def test_two_runs_of_one_name_are_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["curves.py", str(run), str(run)])
    with pytest.raises(SystemExit):
        curves.main()
    assert "two runs have the same name; give --names" in capsys.readouterr().err


def test_a_folder_without_metrics_is_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["curves.py", str(run), str(tmp_path)])
    with pytest.raises(SystemExit):
        curves.main()
    assert f"there is no {tmp_path / 'metrics.csv'}" in capsys.readouterr().err
