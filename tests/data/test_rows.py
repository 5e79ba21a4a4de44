"""Rows of files: their places, columns, solutions, targets and doubles."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from lightning_mpo.data import JsonLines
from lightning_mpo.data.reading import read_rows
from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Completion, FunctionReward
from tests.support.rows import ROW, chat, load


def test_places_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [row.where for row in load(ROW + b"\n" + ROW)] == [
        "line 1 of rows.jsonl",
        "line 3 of rows.jsonl",
    ]
    assert load(b"[" + ROW + b"]")[0].where == "row 1 of rows.jsonl"


def test_numbers_in_other_columns_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"x": 0.50}\n')
    ((_, row),) = read_rows(str(file))
    assert row["x"] == 0.5
    assert json.dumps(row) == '{"x": 0.5}'
    assert pickle.loads(pickle.dumps(row)) == row


def test_a_last_answer_is_the_solution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (row,) = load(chat('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'))
    assert row.solution == "b"
    assert row.messages == ({"role": "user", "content": "a"},)
    assert len(row.extra["messages"]) == 2, "a reward sees the whole chat"


def test_rewards_see_every_column_under_its_name(tmp_path: Path) -> None:
    """TRL's functions take the columns of the data set: `answer`, whatever part it plays here."""
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"question": "1+1=", "answer": 2, "cot": "1+1=2", "target": "t", "level": 3}\n' * 2
    )
    row = (
        JsonLines(str(file), prompt="question", target="answer", solution="cot", validation_share=0)
        .load()
        .train[0]
    )
    assert (row.prompt, row.target, row.solution) == ("1+1=", "2", "1+1=2")
    assert dict(row.extra) == {
        "question": "1+1=",
        "answer": 2,
        "cot": "1+1=2",
        "target": "t",
        "level": 3,
    }
    seen: dict[str, Any] = {}

    def look(completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0]

    FunctionReward(look).score(
        [Completion(row.prompt, "2", row.target, 1, True, row.extra, solution=row.solution)]
    )
    assert {name: seen[name] for name in row.extra} == {
        name: [value] for name, value in row.extra.items()
    }
    assert seen["solution"] == ["1+1=2"]

    def answer_and_target(
        completions: list[str], answer: list[int], target: list[str]
    ) -> list[float]:
        return [float(a == 2 and t == "2") for a, t in zip(answer, target, strict=True)]

    file.write_text('{"prompt": "1+1=", "answer": 2}\n')
    row = JsonLines(str(file), target="answer", validation_share=0).load().train[0]
    done = Completion(row.prompt, "2", row.target, 1, True, row.extra)
    assert FunctionReward(answer_and_target).score([done]) == [1.0]


def test_a_target_of_its_own_name_is_text_for_rewards(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1=", "target": 2.0, "solution": "s"}\n')
    row = JsonLines(str(file), solution="solution", validation_share=0).load().train[0]
    assert dict(row.extra) == {"prompt": "1+1=", "target": "2", "solution": "s"}


def test_prompts_that_differ_by_white_space_leak(tmp_path: Path) -> None:
    train, held_out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    train.write_text('{"prompt": "How many  are\\nthere?", "target": "2"}\n')
    held_out.write_text('{"prompt": " How many are there? ", "target": "2"}\n')
    with pytest.raises(UserError, match="1 prompts are both in .* such as ' How many are there"):
        _ = JsonLines(str(train), str(held_out)).splits


def test_one_prompt_with_two_targets_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "a", "target": "2"},
        {"prompt": "a ", "target": "3"},
        {"prompt": "b", "target": " 4"},
    ]
    rows += [{"prompt": "b", "target": "4"}]
    content = "\n".join(map(json.dumps, rows)).encode()
    with pytest.warns(
        UserWarning,
        match="1 prompts have rows with different targets, such as 'a' with '2' and '3'",
    ):
        load(content)
