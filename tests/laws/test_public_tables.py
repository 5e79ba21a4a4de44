"""Public data sets: rows in their public form, fixed splits, and a request that stays as it is."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_mpo.data import (
    Aime,
    Amc,
    Gsm8k,
    HumanEval,
    Math500,
    MathProblems,
    Mbpp,
    PublicTable,
)
from lightning_mpo.errors import UserError

MATH = {"problem": "{}?", "level": "Level 1", "type": "Algebra", "solution": "\\boxed{{{}}}"}
FUNCTION = {"prompt": "def f{}():\n", "entry_point": "f{}", "canonical_solution": "    return {}\n"}
TASK = {"text": "Return {}.", "code": "def f(): return {}", "test_list": ["assert f() == {}"]}
MEMBERS: dict[type[PublicTable], tuple[dict[str, Any], dict[str, Any]]] = {
    Gsm8k: ({"question": "{}?", "answer": "It is {}.\n#### {}"},) * 2,
    MathProblems: (MATH, MATH),
    Math500: (MATH, {"problem": "{}?", "level": 3, "subject": "Algebra", "answer": "{}"}),
    Aime: (MATH, {"problem": "{}?", "solution": "Count.", "answer": "{}"}),
    Amc: (MATH, {"problem": "{}?", "answer": "{}"}),
    HumanEval: ({**FUNCTION, "test": "def check(f):\n    assert f() == {}\n"},) * 2,
    Mbpp: (TASK, TASK),
}
"""Each class, with a row to train on and one to validate on; `{}` stands for a number."""


def numbered(record: dict[str, Any], number: int) -> dict[str, Any]:
    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(part) for part in value]
        if not isinstance(value, str):
            return value
        return value.replace("{{{}}}", f"{{{number}}}").replace("{}", str(number))

    return {name: fill(value) for name, value in record.items()}


@pytest.fixture(params=MEMBERS, ids=lambda owner: owner.__name__)
def owner(request):
    return request.param


def write(owner: type[PublicTable], folder: Path) -> str:
    """Write six rows to train on and four others to validate on; return the folder."""
    sides = (owner.TRAIN, owner.VALIDATION)
    for side, (split, record) in enumerate(zip(sides, MEMBERS[owner], strict=True)):
        if split is not None:
            numbers = range(6) if side == 0 else range(10, 14)
            text = "\n".join(json.dumps(numbered(record, number)) for number in numbers)
            path = folder / split.file.removesuffix(".gz")
            path.write_text(text)
            if split.file.endswith(".gz"):
                path.rename(folder / split.file)
    return str(folder)


def test_files_hold_the_splits_and_rewards_get_all_columns(owner, tmp_path):
    splits = owner(write(owner, tmp_path)).splits
    counts = (3, 3) if owner.VALIDATION is None else (6, 4)
    assert (len(splits.train), len(splits.validation)) == counts
    columns = set(MEMBERS[owner][0]) - {"level"}
    for row in [*splits.train, *splits.validation]:
        assert row.prompt
        assert row.where
        assert row.target or owner.TARGET is None
    assert all(columns <= set(row.extra) and row.solution for row in splits.train)


def test_the_split_does_not_depend_on_a_seed(owner, tmp_path):
    folder = write(owner, tmp_path)
    assert owner(folder).splits == owner(folder, seed=7).splits == owner(folder).load()


def test_the_request_is_part_of_the_identity_and_changes_no_row(owner, tmp_path):
    folder = write(owner, tmp_path)
    first, other = owner(folder), owner(folder, suffix="Go.", instruction="Do this: ")
    assert first.suffix
    assert first.splits == other.splits
    before, after = first.identity(), other.identity()
    assert {n for n in before if before[n] != after[n]} == {"suffix", "instruction"}


def test_a_row_of_another_form_is_named(owner):
    with pytest.raises(UserError, match="^row 3 has no '"):
        owner().row({"other": 1}, "row 3")


def test_a_folder_in_the_environment_comes_before_the_hub(owner, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_MPO_DATA", str(tmp_path))
    assert all(str(source).startswith(owner.TRAIN.id) for source in owner().sources()[:1])
    (tmp_path / owner.FOLDER).mkdir()
    write(owner, tmp_path / owner.FOLDER)
    assert owner().splits.train
    assert str(owner().sources()[0]).startswith(str(tmp_path))


def test_a_class_is_short(owner):
    assert len(inspect.getsource(owner).splitlines()) <= 60
