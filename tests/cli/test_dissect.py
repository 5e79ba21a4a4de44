"""`lightning-mpo dissect`: gains with intervals, empty plans, chains, GSM8K's steps, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lightning_mpo.cli.dissect import STEP_SUFFIX, SUFFIX, dissect
from lightning_mpo.data.annotated import Annotated, annotate_gsm8k, rows_of
from lightning_mpo.export.usage import Usage
from lightning_mpo.types import PromptRow

PROBLEMS = [
    Annotated("1+1=", "2", plan="Add.", knowledge=("1 is a number",), difficulty=1),
    Annotated("1+2=", "3", plan="", chain=(("1+0=", "1"), ("1+2=", "3")), difficulty=1),
    Annotated("2+2=", "4", plan="Add.", chain=(("2+0=", "2"),), difficulty=2),
]


def answers(analysis: str, *rights: list[bool | None]) -> list[dict]:
    rows = rows_of(PROBLEMS, analysis)
    return [
        {"columns": {"number": row["number"], "step": row["step"]},
         "samples": [{"right": right} for right in part]}
        for row, part in zip(rows, rights, strict=True)
    ]  # fmt: skip


def test_prompts_hold_the_annotations_and_gold_answers_of_earlier_steps():
    assert [row["prompt"] for row in rows_of(PROBLEMS, "plain")] == ["1+1=", "1+2=", "2+2="]
    assert [row["number"] for row in rows_of(PROBLEMS, "plan")] == [0, 2]
    assert rows_of(PROBLEMS, "plan")[0]["prompt"] == "1+1=\n\nPlan:\nAdd."
    assert rows_of(PROBLEMS, "knowledge")[0]["prompt"].endswith("\n- 1 is a number")
    first, second, _ = rows_of(PROBLEMS, "chain")
    questions = "1+2=\n\nThe problem is split into small questions, one after the other.\nQuestion 1: 1+0=\n"
    end = "\nAnswer question {} alone. Do not solve the rest of the problem."
    assert first["prompt"] == questions + end.format(1)
    assert second["prompt"] == f"{questions}Answer: 1\nQuestion 2: 1+2=\n{end.format(2)}"
    assert (first["target"], second["target"], second["step"]) == ("1", "3", 2)


def test_gains_are_paired_and_those_of_empty_plans_are_zero():
    given = {
        "plain": answers("plain", [True, False], [True, False], [False, False]),
        "plan": answers("plan", [True, True], [False, True]),
        "knowledge": answers("knowledge", [None, True]),
        "chain": answers("chain", [True, True], [True, False], [False, False]),
    }
    summary = dissect(PROBLEMS, given)
    assert summary["plain"][0] == pytest.approx(1 / 3)
    plan = summary["plan"]
    assert plan["problems"] == 3
    assert plan["gain"][0] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert plan["gain"][1] <= plan["gain"][0] <= plan["gain"][2]
    assert plan["by_difficulty"]["1"]["gain"][0] == pytest.approx(0.25)
    # a try without a verdict leaves its problem out
    assert (summary["knowledge"]["problems"], summary["knowledge"]["not_judged"]) == (0, 1)
    assert summary["knowledge"]["gain"] == [None] * 3
    # all steps right: 1 · 1/2 and 0, beside the plain accuracy of the same two problems
    assert summary["chain"]["with"][0] == pytest.approx(0.25)
    assert summary["chain"]["without"][0] == pytest.approx(0.25)
    assert summary["steps"]["1"][0] == pytest.approx(0.5)
    only_empty = [Annotated("1+1=", "2", plan=" ")]
    plain = [{"columns": {"number": 0, "step": 1}, "samples": [{"right": True}]}]
    assert dissect(only_empty, {"plain": plain})["plan"]["gain"][0] == 0


def test_calculations_of_gsm8k_become_plans_and_chains():
    solution = (
        "She sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    )
    rows = [PromptRow("How many?", "72", solution), PromptRow("None?", "1", "It is 1.\n#### 1")]
    (record,), without = annotate_gsm8k(rows)
    assert without == 1
    assert record["plan"] == "1. She sold … clips in May.\n2. In all …."
    assert [step["answer"] for step in record["chain"]] == ["24", "72"]
    assert "72" not in record["plan"] + record["chain"][1]["question"]
    assert record["difficulty"] == 2


def test_a_plan_hides_results_that_later_steps_use():
    solution = "He keeps 16 - 7 = <<16-7=9>>9 eggs.\nHe gets 9 * $2 = $<<9*2=18>>18 a day, for 9 eggs.\n#### 18"
    (record,), _ = annotate_gsm8k([PromptRow("Of 16 eggs 7 are eaten, at $2.", "18", solution)])
    assert record["plan"] == "1. He keeps … eggs.\n2. He gets … a day, for … eggs."
    assert "for 9 eggs" in record["chain"][1]["question"], "a chain gives the answers before"


@pytest.fixture
def folder(tiny_folder, here) -> Path:
    shutil.copytree(tiny_folder, here / "out")
    Usage(temperature=1.5, max_new_tokens=3).write(Path("out"))
    lines = [
        {"problem": "1+1=", "answer": 2, "plan": "1", "difficulty": 1},
        {"problem": "1+2=", "answer": "3", "plan": "", "chain": [{"question": "1=", "answer": 1}]},
    ]
    (here / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return here


MISTAKES = {
    "`dissect` needs a file of annotated problems": [],
    "some.jsonl": ["other/some.jsonl"],
    "has no 'problem'": ["bad.jsonl"],
    "'knowledge' must be a list of texts, got int": ["typed.jsonl"],
    "takes --to FILE, and --path DIR, alone": ["--annotate", "gsm8k"],
    "line 1 of bad.jsonl has no 'problem'": ["bad.jsonl"],
    "'chain' must be a list of questions with answers, got str": ["texts.jsonl"],
    "has no 'answer'": ["steps.jsonl"],
    "'chain' must hold objects with 'question' and 'answer', got str": ["words.jsonl"],
    "'plan' must be text, got list": ["plans.jsonl"],
    "'difficulty' must be a number or text, got list": ["hard.jsonl"],
    "empty.jsonl": ["empty.jsonl"],
    "`--limit` must be at least 1, got 0": ["some.jsonl", "--limit", "0"],
    "`dissect` makes its own benchmarks: leave out `--split`": ["some.jsonl", "--split", "train"],
    "`dissect` needs --model or --checkpoint": ["some.jsonl"],
}
FILES = {
    "bad": {"answer": "1"},
    "typed": {"knowledge": 3},
    "texts": {"chain": "1="},
    "steps": {"chain": [{"question": "1="}]},
    "words": {"chain": ["1="]},
    "plans": {"plan": ["1"]},
    "hard": {"difficulty": [1]},
}
"""A line with a mistake by file. All but the first also have the needed fields."""


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_end_in_one_line(folder, call, capsys, message):
    for name, line in FILES.items():
        needed = {} if name == "bad" else {"problem": "1", "answer": "1"}
        Path(f"{name}.jsonl").write_text(json.dumps(needed | line) + "\n")
    Path("empty.jsonl").write_text("")
    assert call("dissect", *MISTAKES[message]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("dissection").exists()


def test_only_steps_end_with_the_text_that_limits_them(folder, call):
    texts = {}
    for words in ([], ["--step_suffix", "Just this.", "--suffix", "All."]):
        assert call("dissect", "some.jsonl", "--model", "none", *words) == 2, (
            "there is no such model"
        )
        for path in Path("dissection/problems").glob("*.yaml"):
            suffix = yaml.safe_load(path.read_text())["data"]["init_args"]["suffix"]
            texts.setdefault(path.stem, []).append(suffix)
    assert texts == {
        "plain": [SUFFIX, "All."],
        "plan": [SUFFIX, "All."],
        "chain": [STEP_SUFFIX, "Just this."],
    }


def test_a_model_answers_and_an_empty_plan_gains_nothing(folder, call, capsys):
    """The tokenizer of the tiny model knows no line feed, so no annotation is written into a prompt."""
    lines = [{"problem": f"1+{b}=", "answer": 1 + b, "plan": ""} for b in (1, 2)]
    lines.append({"problem": "1+3=", "answer": "4"})
    Path("empty.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", "out", "--accelerator", "cpu", "--completions", 2, "--plain"]
    assert call("dissect", "empty.jsonl", *options, "--suffix", "") == 0
    printed = capsys.readouterr().out
    assert "knowledge  3 of 3 problems have no such annotation" in printed
    assert "plan       1 of 3 problems have no such annotation" in printed
    summary = json.loads(Path("dissection/dissection.json").read_text())
    assert summary["plan"]["problems"] == 2
    assert summary["plan"]["gain"][0] == 0
    assert summary.keys() == {"plain", "plan"}
    # the first problems alone
    assert (
        call("dissect", "empty.jsonl", *options, "--suffix", "", "--limit", 1, "--out", "one") == 0
    )
    assert json.loads(Path("one/dissection.json").read_text())["plan"]["problems"] == 1
