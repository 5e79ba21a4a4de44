"""A study with two stages: the screening makes a choice, which is stored and confirmed on other seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightning_mpo.errors import UserError
from tests.support.study_scripts import choices, lanes, results, stages, studies, study

CONTENT = {
    "runs": "runs",
    "results": "results",
    "tasks": {
        "t": {"config": "t.yaml", "warmup": "w.yaml", "checkpoint": "warm-{seed}.ckpt"},
        "r": {"config": "r.yaml", "metric": "reward", "cells": ["base"], "learning_rates": [0.1]},
    },
    "cells": {
        "base": {"config": "b.yaml"},
        "one": {"config": "o.yaml"},
        "two": {"config": "o.yaml", "arguments": ["--x", {"class_path": "C"}]},
    },
    "screen": {"seeds": [9], "learning_rates": [0.1, 0.2]},
    "confirm": {
        "seeds": [0, 1],
        "comparisons": [{"task": "t", "cell": ["one", "two"], "against": "base"}],
    },
}
SKILL = {"base": 0.5, "one": 0.6, "two": 0.7}


class Fits:
    """Stands for `lightning-mpo`: writes the files of a run, and records the command lines."""

    def __init__(self):
        self.lines = []

    def __call__(self, arguments, log):
        self.lines.append(arguments)
        log.parent.mkdir(parents=True, exist_ok=True)
        if arguments[2] == "w.yaml":
            Path(f"warm-{arguments[-1]}.ckpt").touch()
            return 0
        cell, rate = log.parent.parent.name, float(log.parent.name[2:].split("-")[0])
        # at a rate of 0.2 a run has the same final value, but learns earlier
        end = SKILL[cell] + 0.01 * int(arguments[6])
        middle = end if rate == 0.2 else 0.5
        stage = {"pass_at_1": 0.4, "reward": 0.4, "pass_at_1_interval": [0.3, 0.5]}
        points = [{"length": 3.0, "reward": 0.123456789}, {"validation": middle}]
        points += [{"length": 3.0, "reward": 0.5}, {"validation": end}]
        summary = {"before": stage, "final": stage | {"pass_at_1": end}, "curve": points}
        for point in points:
            if "validation" in point:
                point["validation_reward"] = point["validation"]
        summary |= {"seconds": {"training": 10.0, "validation": 2.0}, "updates": 4}
        (log.parent / "summary.json").write_text(json.dumps(summary))
        return 0


@pytest.fixture
def fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(yaml.safe_dump(CONTENT))
    fits = Fits()
    monkeypatch.setattr(lanes.Lane, "fit", lambda lane, a, log: fits(a, log))
    return fits


def change(**entries):
    content = yaml.safe_load(Path("s.yaml").read_text()) | entries
    Path("s.yaml").write_text(yaml.safe_dump(content))


def written():
    return [json.loads(line) for line in Path("results/results.jsonl").read_text().splitlines()]


def test_both_stages_in_one_command(fits, capsys):
    assert study.main(["s.yaml"]) == 0
    lines = written()
    stages_of = [line["stage"] for line in lines]
    assert stages_of.count("screen") == 3 * 2 + 1
    assert stages_of.count("confirm") == 2 * 2
    # the best rate by area, and the best of two cells
    chosen = json.loads(Path("results/chosen.json").read_text())
    assert {cell: c["learning_rate"] for cell, c in chosen["t"]["cells"].items()} == dict.fromkeys(
        SKILL, 0.2
    )
    assert chosen["t"]["cells"]["two"]["scores"]["0.1"] == pytest.approx((0.45 + 0.645) / 2)
    assert chosen["t"]["comparisons"][0]["cell"] == "two"
    assert {line["cell"] for line in lines if line["stage"] == "confirm"} == {"base", "two"}
    assert {line["seed"] for line in lines if line["stage"] == "confirm"} == {0, 1}
    # the tables and pictures
    text = capsys.readouterr().out
    assert "| t | two | base | 2 | all tokens | +0.200" in text
    assert Path("results/curves.png").stat().st_size > 1000
    assert Path("results/differences.png").stat().st_size > 1000
    assert "## Screening: r" in Path("results/tables.md").read_text()


def test_a_line_is_compact_and_travels(fits, tmp_path):
    study.main(["s.yaml", "--stage", "screen", "--tasks", "r"])
    (line,) = written()
    assert line["training_reward"] == [0.123457, 0.5]
    assert line["seconds_per_update"] == 2.0
    assert line["curve"][1] == {"rollouts": 2, "pass_at_1": 0.59, "reward": 0.59}
    assert line["start"] == {"pass_at_1": 0.4, "reward": 0.4}
    assert line["cpu"]
    assert str(tmp_path) not in json.dumps(line)


def test_finished_runs_are_not_run_again_wherever_their_folders_are(fits):
    study.main(["s.yaml"])
    commands = len(fits.lines)
    assert [a[2] for a in fits.lines].count("w.yaml") == 3, "one warm-up for each seed"
    for folder in Path("runs").glob("*/*/*/*"):
        (folder / "summary.json").unlink()
    assert study.main(["s.yaml"]) == 0
    assert len(fits.lines) == commands


def test_the_command_line_of_a_run(fits):
    study.main(["s.yaml", "--stage", "screen", "--cells", "two"])
    folder = "runs/screen/t/two/lr0.1-seed9"
    arguments = next(a for a in fits.lines if folder in a)  # runs begin in any order
    assert arguments == [
        *("fit", "-c", "t.yaml", "-c", "o.yaml", "--seed_everything", "9"),
        *("--trainer.default_root_dir", folder, studies.LEARNING_RATE, "0.1"),
        *("--x", '{"class_path": "C"}'),
    ]


def test_a_part_of_a_line_is_left_out(fits):
    study.main(["s.yaml", "--stage", "screen"])
    path = Path("results/results.jsonl")
    path.write_text(path.read_text()[:-20])
    assert len(results.Results(Path("results")).lines) == 6
    study.main(["s.yaml", "--stage", "screen"])
    assert len(written()) == 7


def test_nothing_is_chosen_before_a_task_is_screened_in_full(fits):
    study.main(["s.yaml", "--stage", "screen", "--cells", "base", "one"])
    assert study.main(["s.yaml", "--stage", "confirm"]) == 0
    assert list(json.loads(Path("results/chosen.json").read_text())) == ["r"]
    assert not any(line["stage"] == "confirm" for line in written())


def test_a_changed_screening_is_refused(fits, capsys):
    study.main(["s.yaml"])
    lines = written()
    line = next(line for line in lines if (line["task"], line["cell"]) == ("t", "base"))
    line["curve"][0]["pass_at_1"] = 0.9
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path("results/results.jsonl").write_text(text)
    before = Path("results/chosen.json").read_text()
    assert study.main(["s.yaml", "--stage", "confirm"]) == 2
    assert "the screening of base on t differs from the one" in capsys.readouterr().err
    assert Path("results/chosen.json").read_text() == before


def test_a_stored_comparison_stays(fits, capsys):
    study.main(["s.yaml"])
    change(confirm={"seeds": [0, 1], "comparisons": []})
    assert study.main(["s.yaml", "--stage", "confirm"]) == 2
    assert "the comparison of two against base on t is stored" in capsys.readouterr().err
    # one may be added
    more = {"task": "t", "cell": "one", "against": "base", "outcome": "area"}
    comparisons = [*CONTENT["confirm"]["comparisons"], more]
    change(confirm={"seeds": [0, 1], "comparisons": comparisons})
    assert study.main(["s.yaml", "--stage", "confirm"]) == 0
    assert {line["cell"] for line in written() if line["stage"] == "confirm"} == set(SKILL)


def test_no_run_starts_after_the_budget(fits):
    assert study.main(["s.yaml", "--budget-minutes", "0"]) == 0
    assert fits.lines == []


def test_the_list_estimates_what_is_left(fits, capsys):
    study.main(["s.yaml", "--list"])
    printed = capsys.readouterr().out
    assert (
        "screening: 7 runs missing, 0 minutes of one core and 7 runs of unknown length" in printed
    )
    assert "confirmation: 4 runs missing" in printed
    assert fits.lines == []
    runs = [results.Run("screen", "t", cell, 9, 0.1) for cell in ("base", "one")]
    found = results.Results(Path("elsewhere"))
    found.lines = {runs[0]: {"seconds": 60.0}, replace(runs[0], task="r"): {"seconds": 90.0}}
    assert stages.estimate(runs, found) == [60.0, 60.0]
    assert stages.estimate([replace(runs[1], task="x")], found) == [75.0]


def test_a_run_that_fails_has_no_line_and_the_others_go_on(fits, monkeypatch, capsys):
    monkeypatch.setattr(
        lanes.Lane, "fit", lambda lane, a, log: 1 if "one" in str(log) else fits(a, log)
    )
    assert study.main(["s.yaml", "--stage", "screen", "--jobs", "1"]) == 1
    assert "failed: runs/screen/t/one/lr0.1-seed9/run.log" in capsys.readouterr().err
    assert {line["cell"] for line in written()} == {"base", "two"}


def test_a_warm_up_that_fails_is_not_repeated(fits, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(lanes.Lane, "fit", lambda lane, a, log: tried.append(log) or 1)
    assert study.main(["s.yaml", "--stage", "screen", "--tasks", "t"]) == 1
    assert tried == [Path("runs/warm-t-seed9.log")]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"screen": {"seeds": [1], "learning_rates": [0.1]}}, "seed 1 is in `screen.seeds` and"),
        (
            {
                "confirm": {
                    "seeds": [0],
                    "comparisons": [{"task": "t", "cell": "x", "against": "y"}],
                }
            },
            "'x' must be one of base, one, two",
        ),
        ({"confirm": {"seeds": [0], "comparisons": [{"task": "t"}]}}, "missing 2 required"),
        ({"tasks": {"t": {"config": "t.yaml", "metrics": "reward"}}}, "has no key 'metrics'"),
        (
            {"tasks": {"t": {"config": "t.yaml", "metric": "loss"}}},
            "'loss' must be one of pass_at_1",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line(fits, capsys, entries, message):
    change(**entries)
    assert study.main(["s.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    with pytest.raises(UserError):
        studies.read_staged(Path("s.yaml"))


def test_the_support_counts_where_it_was_judged():
    line = {"start": {"reward": 0.2}, "final": {"reward": 0.3, "support_reward": 0.5}}
    line["curve"] = [{"rollouts": 2, "reward": 0.4, "support_reward": 0.6}]
    assert choices.value_of(line["final"], "reward", "support") == 0.5
    assert choices.value_of(line["start"], "reward", "support") == 0.2
    assert choices.points_of(line, "reward", "whole") == [(0.0, 0.2), (2, 0.4)]
    assert choices.points_of(line, "reward", "support") == [(0.0, 0.2), (2, 0.6)]
    # a run over the whole vocabulary, evaluated on a support before and after
    line["start"]["support_reward"] = 0.3
    assert choices.points_of(line, "reward", "support") == [(0.0, 0.3), (2, 0.6)]
    del line["curve"][0]["support_reward"]
    assert choices.points_of(line, "reward", "support") == [(0.0, 0.2), (2, 0.4)]
