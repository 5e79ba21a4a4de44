"""Shares of groups with a signal by level: against counts by hand, rows of whole problems, and mistakes."""

from __future__ import annotations

import argparse

import pytest
import yaml

from benchmarks import sparkle_levels
from benchmarks.sparkle_levels import main, measure, rows_of, scaffolded

SMALL = {"digits": 3, "train_problems": 9, "held_out_problems": 2}
TRIES = {"w": [False, False], "s": [True, False], "r": [True, True], "?": [True, None]}


def answers(*problems: str) -> list[dict]:
    """Return answers of problems, a letter for each level."""
    return [
        {"columns": {"level": level}, "samples": [{"right": right} for right in TRIES[letter]]}
        for problem in problems
        for level, letter in enumerate(problem)
    ]


def test_shares_are_counted_by_level_and_compared_on_the_same_problems():
    table = measure(answers("wsr", "ws", "srr", "w?s", "www"))
    assert [row[:2] for row in table] == [["0", "5"], ["1", "4"], ["2", "4"]]
    means = [[cell.split()[0] for cell in row[2:] if cell] for row in table]
    # of the problems with both levels; one without a verdict is left out
    gains = {1: (1 + 1 - 1 + 0) / 4, 2: (0 - 1 + 1 + 0) / 4}
    assert means == [
        ["0.100", "0.200", "0.000"],
        ["0.500", "0.500", "0.250", f"{gains[1]:.3f}"],
        ["0.625", "0.250", "0.500", f"{gains[2]:.3f}"],
    ]


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {"class_path": "Multiplication", "init_args": SMALL}
    splitter = {"class_path": "Delimiters", "init_args": {"characters": ",;"}}
    options = {"base": base, "chunks": 2, "splitter": splitter, "seed": 3}
    data = {"pool": {"class_path": "Scaffolded", "init_args": options}, "uncut": base}
    for name, section in data.items():
        content = {"data": section, "rollout": {"rewards": ["ExactAnswer"]}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "empty.yaml").write_text("trainer: {max_steps: 1}\n")
    return tmp_path


def test_the_limit_counts_the_rows_of_whole_problems(pool):
    options = argparse.Namespace(data="pool.yaml", problems=2, chunks=4, whole=False, plain=True)
    for whole, rows in ((False, 4), (True, 6)):
        options.whole = whole
        content = scaffolded(options)
        (pool / "made.yaml").write_text(yaml.safe_dump(content))
        assert rows_of(pool / "made.yaml", options) == rows
    made = content["data"]["init_args"]
    assert (made["chunks"], made["column"], "seed" in made) == (2, "level", False)
    assert made["base"]["init_args"]["chat_template"] is False, "--plain"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pool.yaml", "--problems", "10"], "`--problems` must be at most 9"),
        (["pool.yaml", "--problems", "0"], "`sparkle_levels.problems` must be at least 1"),
        (["pool.yaml", "--completions", "1"], "`sparkle_levels.completions` must be at least 2"),
        (["uncut.yaml"], "no solution of 9 has a level from 1 on"),
        (["empty.yaml"], "'empty.yaml' has no `data` or no `rollout.rewards`"),
        (["nothing"], "no configuration file or recipe 'nothing'"),
    ],
)
def test_mistakes_end_in_one_line_before_a_model_is_loaded(
    pool, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(sparkle_levels.evaluate, "main", lambda arguments: 1 / 0)
    assert main([*arguments, "--model", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
