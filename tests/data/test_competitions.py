"""MATH, MATH-500, AIME and AMC: rows in their public forms."""

from __future__ import annotations

import json

import pytest

from lightning_mpo.data import Aime, Amc, EasyToHard, Math500, MathProblems
from lightning_mpo.data.competitions import last_boxed
from lightning_mpo.errors import UserError

MATH = {
    "problem": "What is $1+1$? ",
    "level": "Level 2",
    "solution": r"We add, so $1+1=\boxed{2}$.",
    "type": "Algebra",
}
MATH_500 = {
    "problem": "Find $x$.",
    "solution": r"It is $\boxed{\frac{1}{2}}$.",
    "answer": r"\frac{1}{2}",
    "subject": "Precalculus",
    "level": 5,
    "unique_id": "test/precalculus/807.json",
}
AIME_2024 = {
    "id": 60,
    "problem": "Find $n$.",
    "solution": "Count.",
    "answer": "025",
    "year": "2024",
}
AMC_12 = {"id": 0, "problem": "Find $m+n$.", "answer": 142.0, "url": "https://example.org"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{2}", "2"),
        (r"\boxed{1} and \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed 7$", "7"),
        (r"\fbox{A}", "A"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{{a}}", "{a}"),
        (r"\boxed{1", None),
        ("none", None),
        (r"\boxed", None),
    ],
)
def test_the_last_box_holds_the_answer(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("record", "target", "level", "type"),
    [
        (MATH, "2", 2, "Algebra"),
        ({**MATH, "level": "Level ?"}, "2", "Level ?", "Algebra"),
        (MATH_500, r"\frac{1}{2}", 5, "Precalculus"),
        (AIME_2024, "025", None, None),
        (AMC_12, "142", None, None),
    ],
)
def test_each_form_becomes_a_problem(record, target, level, type):
    row = MathProblems().row(record, "row 1")
    assert (row.prompt, row.target) == (record["problem"].strip(), target)
    assert (row.extra["level"], row.extra["type"]) == (level, type)
    assert row.solution == record.get("solution")


def test_a_solution_without_a_box_is_named():
    with pytest.raises(UserError, match=r"row 7: 'solution' has no \\boxed\{…\} with the answer"):
        MathProblems().row({**MATH, "solution": "It is 2."}, "row 7")


@pytest.mark.parametrize(
    ("owner", "file", "record"),
    [
        (MathProblems, "test.jsonl", {**MATH, "problem": "Other"}),
        (Math500, "math500.jsonl", MATH_500),
        (Aime, "aime_2024.jsonl", AIME_2024),
        (Amc, "amc.jsonl", AMC_12),
    ],
)
def test_all_train_on_math_and_validate_on_their_own_problems(tmp_path, owner, file, record):
    (tmp_path / "train.jsonl").write_text(json.dumps(MATH))
    (tmp_path / file).write_text(json.dumps(record))
    data = owner(str(tmp_path), curriculum=EasyToHard(rollouts=3))
    data.setup("fit")
    assert [row.prompt for row in data.splits.train] == ["What is $1+1$?"]
    assert [row.prompt for row in data.splits.validation] == [record["problem"]]
    assert "\\boxed{}" in data.suffix
    assert owner.VALIDATION.file == file
