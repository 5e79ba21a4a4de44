"""`lightning-mpo shift` on files of answers: its table, its files, and mistakes in one line."""

from __future__ import annotations

import json

import pytest

from lightning_mpo.cli import shift
from lightning_mpo.rollout.answer_file import AnswerFile

SETTINGS = {"completions": 2, "seed": 0}


def write(path, design, evaluator, **settings):
    about = {"benchmark": "peptides", "problems": len(design), "rows": "same", "architecture": "a"}
    problems = [
        {
            "problem": p,
            "samples": [
                {"right": x >= 0.85, "scores": {"design": x, "evaluator": y}}
                for x, y in zip(row, other, strict=True)
            ],
        }
        for p, (row, other) in enumerate(zip(design, evaluator, strict=True))
    ]
    AnswerFile(path, about | {"settings": SETTINGS | settings}).write(problems)
    return str(path)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = write(
        tmp_path / "a.jsonl", [[0.9, 0.1], [0.1, 0.2], [0, 0]], [[0.9, 0.9], [0, 1], [0, 0]]
    )
    done = write(
        tmp_path / "b.jsonl", [[0.9, 0.9], [0.9, 0.9], [0, 0]], [[0.1, 0.1], [0, 1], [0, 0]]
    )
    return base, done


def test_the_table_is_printed_and_written_with_a_figure(files, tmp_path, capsys):
    words = ["--reward", "design", "--threshold", "0.85", "--independent", "evaluator"]
    assert shift.main([*files, *words, "--independent-threshold", "0.8"]) == 0
    text = capsys.readouterr().out
    assert "3 contexts, k = 2" in text
    assert "delta-ESR  inf: training - independent" in text
    summary = json.loads((tmp_path / "shift" / "shift.json").read_text())
    design, evaluator = summary["judges"].values()
    assert [design[name][0] for name in ("preserved", "expansion", "shrinkage")] == [
        1 / 3,
        1 / 3,
        0,
    ]
    assert [evaluator[name][0] for name in ("expansion", "shrinkage", "esr")] == [0, 1 / 3, 0]
    assert (tmp_path / "shift" / "shift.png").stat().st_size > 1000


def test_without_a_reward_right_answers_are_solutions(files, tmp_path):
    assert shift.main([*files, "--k", "1", "--out", "one"]) == 0
    table = json.loads((tmp_path / "one" / "shift.json").read_text())["judges"]["right"]
    assert table["expansion"][0] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "design"], "`--reward` and `--threshold` belong together"),
        (["--independent-threshold", "1"], "`--independent` and `--independent-threshold` belong"),
        (["--k", "3"], "`--k` must be from 1 to 2, the completions, got 3"),
        (["--reward", "charm", "--threshold", "1"], "no scores of the reward 'charm'"),
        (["--greedy"], "`shift` has no option `--greedy` for files of answers"),
    ],
)
def test_mistakes_end_in_one_line(files, capsys, words, message):
    assert shift.main([*files, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_files_of_other_settings_and_checkpoints_without_problems_are_refused(
    files, tmp_path, capsys
):
    other = write(tmp_path / "c.jsonl", [[0, 0]] * 3, [[0, 0]] * 3, seed=1)
    assert shift.main([files[0], other]) == 2
    assert "has other settings (seed: 1 here" in capsys.readouterr().err
    assert shift.main(["last.ckpt", files[1]]) == 2
    assert "`shift` needs --benchmark for the checkpoint 'last.ckpt'" in capsys.readouterr().err
