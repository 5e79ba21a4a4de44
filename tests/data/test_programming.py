"""HumanEval and MBPP: rows in their public forms, with the columns that `CodeAnswer` reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightning_mpo.data import HumanEval, Mbpp
from lightning_mpo.errors import UserError

FUNCTION = {
    "task_id": "HumanEval/0",
    "prompt": 'def one():\n    """Return 1."""\n',
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}
TASK = {
    "task_id": 602,
    "text": "Write a function that returns 1.",
    "code": "def one():\r\n  return 1",
    "test_list": ["assert one() == 1", "assert one() != 2"],
    "test_setup_code": "",
}


def test_a_function_to_complete():
    data = HumanEval()
    row = data.row(FUNCTION, "row 1")
    assert row.prompt == FUNCTION["prompt"]
    assert row.extra == FUNCTION
    assert row.solution == '```python\ndef one():\n    """Return 1."""\n    return 1\n```'
    assert data.instruction.endswith("```python\n")
    assert data.suffix == "```"
    assert data.judged
    plain = HumanEval(chat_template=False)
    assert plain.row(FUNCTION, "row 1").solution == "    return 1\n"
    assert (plain.instruction, plain.suffix) == ("", "")
    assert HumanEval(instruction="a", suffix="b").suffix == "b"
    with pytest.raises(UserError, match="row 1 has no 'test'"):
        data.row({"prompt": "a", "entry_point": "b"}, "row 1")


def test_half_of_the_functions_are_held_out_always_the_same(tmp_path):
    lines = [json.dumps({**FUNCTION, "prompt": f"def f{i}():\n"}) for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "rows.jsonl")
    splits = HumanEval(path).splits
    assert (len(splits.train), len(splits.validation)) == (5, 5)
    assert HumanEval(path, seed=3).splits == splits


def test_the_public_file_has_164_functions(monkeypatch):
    shared = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("LIGHTNING_MPO_DATA") or shared)
    if not (folder / "humaneval").is_dir():
        pytest.skip(f"{folder}/humaneval is absent; set LIGHTNING_MPO_DATA")
    monkeypatch.setenv("LIGHTNING_MPO_DATA", str(folder))
    splits = HumanEval().splits
    assert (len(splits.train), len(splits.validation)) == (82, 82)
    for row in splits.train:
        compile(row.solution.removeprefix("```python\n").removesuffix("```"), "solution", "exec")


def test_a_task_shows_its_tests(tmp_path):
    for name in ("train", "test"):
        row = {**TASK, "text": f"{TASK['text']} ({name})"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    data = Mbpp(str(tmp_path))
    row = data.splits.train[0]
    assert row.prompt == (
        "Write a function that returns 1. (train) Your code should pass these tests:\n\n"
        "assert one() == 1\nassert one() != 2"
    )
    assert row.solution == "```python\ndef one():\n  return 1\n```"
    assert row.extra["test_list"] == TASK["test_list"]
    assert data.judged
    with pytest.raises(UserError, match="row 2: 'test_list' must be a list of texts"):
        data.row({**TASK, "test_list": "assert one() == 1"}, "row 2")
