"""`lightning-mpo sift`: problems that no try solved become rows, with the file that says how."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from lightning_mpo import cli
from lightning_mpo.data import Table
from lightning_mpo.export.usage import Usage
from lightning_mpo.rollout.answer_file import AnswerFile, read_answers

ROWS = [
    {"prompt": f"{a}+{b}=", "target": f"{a + b}", "solution": f"so {a + b}", "level": a % 2}
    for a in range(5)
    for b in (0, 7)
]
SUMS = """
data:
  class_path: Table
  init_args: {train: train.jsonl, validation: held_out.jsonl, chat_template: false, solution: solution}
rollout: {rewards: [{class_path: MathAnswer, init_args: {require_finished: false}}]}
"""
RIGHTS = [[False] * 3, [True, False, False], [True] * 3, [False, None, False], *[[False] * 3] * 6]
SIFT = ["sift", "answers/sums.jsonl", "--problems", "sums.yaml", "--to", "hard.jsonl"]


@pytest.fixture(scope="module")
def answered(tmp_path_factory, tiny_folder) -> Path:
    """Answers of a model to training rows, whose verdicts a test then writes."""
    folder = tmp_path_factory.mktemp("sift")
    shutil.copytree(tiny_folder, folder / "out")
    Usage(temperature=1.5, max_new_tokens=4).write(folder / "out")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "train.jsonl").write_text(lines)
    (folder / "held_out.jsonl").write_text(json.dumps(ROWS[0] | {"prompt": "9+9="}) + "\n")
    (folder / "sums.yaml").write_text(SUMS)
    model = ["--model", "out", "--benchmarks", "sums.yaml", "--accelerator", "cpu"]
    options = ["--split", "train", "--completions", 3, "--out", "answers"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.run(["evaluate", *model, *options]) == 0
    return folder


@pytest.fixture
def here(answered, monkeypatch) -> Path:
    monkeypatch.chdir(answered)
    return answered


def test_unsolved_problems_become_rows_to_train_on(here, call, capsys):
    about, problems = read_answers(Path("answers/sums.jsonl"))
    assert about["split"] == "train"
    assert [problem["prompt"] for problem in problems] == [row["prompt"] for row in ROWS]
    for problem, rights in zip(problems, RIGHTS, strict=True):
        for sample, right in zip(problem["samples"], rights, strict=True):
            sample["right"] = right
    AnswerFile(Path("answers/sums.jsonl"), about).write(problems)
    capsys.readouterr()
    # 0 of 3
    assert call(*SIFT) == 0
    assert "7 of 10 problems are hard" in (printed := capsys.readouterr().out)
    assert "1 without a verdict are left out" in printed
    chosen = [json.loads(line) for line in Path("hard.jsonl").read_text().splitlines()]
    assert chosen == [ROWS[i] for i in (0, 4, 5, 6, 7, 8, 9)]
    manifest = json.loads(Path("hard.manifest.json").read_text())
    assert (manifest["problems"], manifest["hard"], manifest["undecided"]) == (10, 7, 1)
    assert manifest["settings"]["completions"] == 3
    assert manifest["settings"]["temperature"] == 1.5
    assert {"seed", "max_new_tokens"} <= manifest["settings"].keys()
    assert manifest["plain"] is True
    assert manifest["settings"]["chat_template"] is False
    assert (manifest["model"], manifest["split"], len(manifest["weights"])) == ("out", "train", 16)
    # the rows are read as they were
    table = Table("hard.jsonl", "held_out.jsonl", solution="solution")
    rows = table.splits.train
    assert [(row.prompt, row.target, row.solution, row.extra["level"]) for row in rows] == [
        (row["prompt"], row["target"], row["solution"], row["level"]) for row in chosen
    ]
    # at most 1 of 3
    assert call(*SIFT, "--most", 1) == 0
    assert "8 of 10 problems are hard" in capsys.readouterr().out


MISTAKES = {
    "there is no file of answers nowhere.jsonl": ["sift", "nowhere.jsonl", *SIFT[2:]],
    "`--most` must be from 0 to 2, as each problem has 3 tries, got 3": [*SIFT, "--most", 3],
    "`--to` must be a file that ends in .jsonl": [*SIFT[:-1], "hard.txt"],
    "is not of the problems of 'other': the first 10": [*SIFT[:3], "other.yaml", *SIFT[4:]],
    "no configuration file or recipe 'gsm9k'": [*SIFT[:3], "gsm9k", *SIFT[4:]],
    "the evaluation has not ended: run it again": ["sift", "half/sums.jsonl", *SIFT[2:]],
    "half/cut.jsonl is not whole: it holds 9 of 10": ["sift", "half/cut.jsonl", *SIFT[2:]],
    "is no file of answers: line 2 is damaged": ["sift", "half/torn.jsonl", *SIFT[2:]],
    "is no file of answers: line 1 is damaged": ["sift", "train.jsonl", *SIFT[2:]],
    "has no problem that at most 0 of 3 tries solved": ["sift", "half/all.jsonl", *SIFT[2:]],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_end_in_one_line(here, call, capsys, message):
    (here / "other.jsonl").write_text(json.dumps(ROWS[0] | {"prompt": "8+8="}) + "\n")
    (here / "other.yaml").write_text(SUMS.replace("train: train", "train: other"))
    lines = (here / "answers" / "sums.jsonl").read_text().splitlines(keepends=True)
    half = here / "half"
    half.mkdir(exist_ok=True)
    (half / ".sums.jsonl.part").write_text("".join(lines[:4]))
    (half / "cut.jsonl").write_text("".join(lines[:-1]))
    (half / "torn.jsonl").write_text(lines[0] + lines[1][:-9] + "\n" + "".join(lines[2:]))
    solved = [re.sub(r'"right": \w+', '"right": true', line) for line in lines]
    (half / "all.jsonl").write_text("".join(solved))
    assert call(*MISTAKES[message]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
