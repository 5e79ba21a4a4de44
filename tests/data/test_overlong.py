"""Prompts over the limit are cut to their ends, and lengths are described in one line."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow
from tests.support.chats import Rows, dotted, make_tokenizer, render

TURN = {"role": "user", "content": "abc"}
ANSWER = {"role": "assistant", "content": "x"}
SYSTEM = {"role": "system", "content": "s"}


def cut(*rows: PromptRow | str, limit: int, **options: Any) -> Rows:
    data = Rows(*rows, overlong="cut", max_prompt_tokens=limit, **options)
    with pytest.warns(UserWarning, match="are cut to their ends"):
        data.connect(make_tokenizer())
    return data


@pytest.mark.parametrize("limit", [2, 5, 11])
def test_a_text_is_cut_to_its_end(limit: int) -> None:
    text = "0123456789abcdef"
    data = cut("12" if limit > 4 else "1", text, limit=limit, chat_template=False)
    assert data.splits.train[1].prompt == text[-(limit - 1) :]  # and a beginning of sequence
    assert data.longest_prompt == limit
    assert len(data.encode(data.splits.train)) == 2


def test_instruction_and_suffix_stay() -> None:
    rows = [PromptRow("0123456789", "1"), PromptRow("1" * 10_000_000, "1")]
    data = cut(*rows, limit=9, chat_template=False, instruction="abc", suffix="=")
    assert [row.prompt for row in data.splits.train] == ["6789", "1111"]


def test_a_chat_loses_its_oldest_turns_first() -> None:
    messages = (SYSTEM, TURN, ANSWER, {**TURN, "content": "d" * 40})
    row = PromptRow("d" * 40, "1", messages=messages)
    whole = len(render(row)[0].split("."))
    for limit in (whole - 1, whole - 20, whole - 40):
        (short,) = cut(row, limit=limit).splits.train
        assert short.messages[0] == SYSTEM
        assert [message["role"] for message in short.messages] == ["system", "user"]
        assert short.prompt == short.messages[-1]["content"]
        assert short.prompt == "d" * 40 or len(short.prompt) < 40
        (tokens,) = render(short)
        assert len(tokens.split(".")) <= limit
        if len(short.prompt) < 40:
            assert len(tokens.split(".")) == limit, "no more is cut than needed"


def test_text_around_a_prompt_that_is_too_long() -> None:
    options: dict[str, Any] = {"overlong": "cut", "max_prompt_tokens": 4, "chat_template": False}
    data = Rows("0123", instruction="abcdef", **options)
    with pytest.raises(UserError, match=r"no end of the prompt '0123' fits into `data.max_prompt"):
        data.connect(make_tokenizer())


def test_identity_is_that_of_the_rows_before_the_cut() -> None:
    data = Rows("0123456789", overlong="cut", max_prompt_tokens=4, chat_template=False)
    before = data.identity()
    data.connect(make_tokenizer())
    assert data.identity() == before
    assert before["overlong"] == "cut"


def test_lengths_are_told_once_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    data = Rows(*("1" * n for n in range(1, 11)), "2" * 30, overlong="skip", max_prompt_tokens=20,
                chat_template=False)  # fmt: skip
    with caplog.at_level(logging.INFO):
        data.connect(make_tokenizer())
        data.connect(make_tokenizer())
    lines = [
        record.getMessage()
        for record in caplog.records
        if "tokens of a prompt" in record.getMessage()
    ]
    assert lines == [
        "data       Rows: 10 rows, 1 skipped, 0 cut; tokens of a prompt: mean 6.5, median 6.5, p95 11, max 11"
    ]


def test_examples_come_before_each_prompt() -> None:
    shots = [PromptRow("1+1", "2", solution="2"), PromptRow("2+2", "4", solution="4")]
    data = Rows("3+3", chat_template=False, suffix="=", instruction="a")
    data.shots = shots
    data.connect(make_tokenizer())
    ids = data.encode(data.splits.train).input_ids_PS[0].tolist()
    text = "a1+1=2\n\n2+2=4\n\n3+3="
    assert ".".join(make_tokenizer().convert_ids_to_tokens(ids)) == dotted("<bos>", text)
    assert data.longest_prompt == len(text) + 1


def test_examples_are_turns_of_a_chat() -> None:
    shot = PromptRow("1", "2", solution="b", messages=(SYSTEM, {"role": "user", "content": "1"}))
    data = Rows("3", suffix="=", system="t")
    data.shots = [shot]
    data.connect(make_tokenizer())
    (row,) = data.splits.train
    assert data._renderer is not None
    assert data._renderer.messages(row) == [
        {"role": "system", "content": "t"},
        {"role": "user", "content": "1="},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "3="},
    ]
    assert data.longest_prompt == data.encode([row]).input_ids_PS.shape[1]
    data.shots = [PromptRow("1", "2", solution="Ä")]
    with pytest.raises(UserError, match="cannot encode the prompt '1'"):
        data.connect(make_tokenizer())
