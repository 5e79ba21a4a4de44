"""`JsonLines`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_mpo.data import JsonLines
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow


def write(file: Path, lines: list[Any]) -> str:
    file.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return str(file)


def rows(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1", "target": i + 1, "level": 2} for i in range(start, stop)]


def test_two_files(tmp_path: Path) -> None:
    train, validation = (
        write(tmp_path / "a.jsonl", rows(0, 3)),
        write(tmp_path / "b.jsonl", rows(3, 5)),
    )
    splits = JsonLines(train=train, validation=validation).splits
    assert splits.train[0] == PromptRow(
        "0+1", "1", None, {"prompt": "0+1", "target": "1", "level": 2}
    )
    assert [row.prompt for row in splits.validation] == ["3+1", "4+1"]


def test_one_file_is_split(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", rows(0, 20) * 2)
    splits = JsonLines(train=train, validation_share=0.25).splits
    assert (len(splits.train), len(splits.validation)) == (30, 10)
    assert not {r.prompt for r in splits.train} & {r.prompt for r in splits.validation}
    assert JsonLines(train=train, validation_share=0.25, seed=9).splits == splits
    assert JsonLines(train=train, validation_share=0.25, split_seed=9).splits != splits


def test_named_columns_and_blank_lines(tmp_path: Path) -> None:
    lines = [
        {"question": "q é", "answer": "a", "steps": "s"},
        "",
        {"question": "r", "answer": 72.0, "steps": "t"},
    ]
    data = JsonLines(
        train=write(tmp_path / "a.jsonl", lines),
        prompt="question",
        target="answer",
        solution="steps",
        validation_share=0,
    )
    assert data.splits.train == [
        PromptRow("q é", "a", "s", lines[0]),
        PromptRow("r", "72", "t", lines[2]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"line 3 of .*a.jsonl is not JSON: Expecting property name"),
        ("[1]", "line 3 of .*a.jsonl must be an object with columns, got list"),
        (
            {"prompts": "1", "target": "2"},
            "line 3 of .*a.jsonl has no 'prompt'; its columns are 'prompts', 'target'; did",
        ),
        ({"prompts": "1", "target": "2"}, "did you mean 'prompts'\\?"),
        (
            {"prompt": "1", "x": "2"},
            "line 3 of .*a.jsonl has no 'target'; its columns are 'prompt', 'x'$",
        ),
        ({"prompt": "1", "target": None}, "line 3 of .*a.jsonl: 'target' is null$"),
        ({"prompt": ["1"], "target": "2"}, "line 3 of .*a.jsonl: 'prompt' must be text, got list"),
    ],
)
def test_broken_lines(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = JsonLines(train=write(tmp_path / "a.jsonl", [rows(0, 1)[0], "", line])).splits


def test_missing_solution(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1 of .* has no 'solution'"):
        _ = JsonLines(train=write(tmp_path / "a.jsonl", rows(0, 2)), solution="solution").splits


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file absent.jsonl \(seen from "):
        _ = JsonLines(train="absent.jsonl").splits
    with pytest.raises(UserError, match=r"there is no file .*b.jsonl"):
        _ = JsonLines(
            train=write(tmp_path / "a.jsonl", rows(0, 2)), validation=str(tmp_path / "b.jsonl")
        ).splits


def test_a_prompt_in_both_files_is_refused(tmp_path: Path) -> None:
    train, validation = (
        write(tmp_path / "a.jsonl", rows(0, 4)),
        write(tmp_path / "b.jsonl", rows(2, 6)),
    )
    with pytest.raises(
        UserError, match=r"2 prompts are both in .*a.jsonl and in .*b.jsonl, such as '2\+1'"
    ):
        _ = JsonLines(train=train, validation=validation).splits


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`JsonLines` found no training rows"):
        _ = JsonLines(train=write(tmp_path / "a.jsonl", [])).splits
