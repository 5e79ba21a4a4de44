"""Files that are read: lines of JSON in each encoding, and their options."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from lightning_mpo.data import JsonLines
from lightning_mpo.errors import UserError
from tests.support.rows import OK, ROW, chat, load, target

READ: dict[str, tuple[bytes, list[tuple[str, str]]]] = {
    "byte order mark": (b"\xef\xbb\xbf" + ROW, [("1", "2")]),
    "gzip": (gzip.compress(ROW), [("1", "2")]),
    "a list": (
        b'[{"prompt": "1", "target": "2"}, {"prompt": "3", "target": 4}]',
        [("1", "2"), ("3", "4")],
    ),
    "a list over lines": (b'\n[\n {"prompt": "1",\n "target": "2"}\n]\n', [("1", "2")]),
    "CRLF": (OK.replace("\n", "\r\n").encode() * 2, [("1", "2")] * 2),
    "mixed ends of lines": (ROW + OK.replace("\n", "\r\n").encode(), [("1", "2")] * 2),
    "CR": (OK.replace("\n", "\r").encode() * 2, [("1", "2")] * 2),
    "a line separator in a text": (OK.replace("1", "a\u2028b").encode(), [("a\u2028b", "2")]),
    "a whole pair": (rb'{"prompt": "\ud83d\ude00", "target": "2"}', [("😀", "2")]),
    "nan where nothing reads it": (b'{"prompt": "1", "target": 1, "x": NaN}', [("1", "1")]),
    "1e-07": (target("1e-07"), [("1", "0.0000001")]),
    "2.5e-08": (target("2.5e-08"), [("1", "0.000000025")]),
    "1e16": (target("1e16"), [("1", "10000000000000000")]),
    "72.0": (target("72.0"), [("1", "72")]),
    "-0.0": (target("-0.0"), [("1", "0")]),
    "1e22": (target("1e22"), [("1", "1" + "0" * 22)]),
    "more digits than a float": (
        target("3.14159265358979323846264338327"),
        [("1", "3.14159265358979323846264338327")],
    ),
    "a large integer": (
        target("123456789012345678901234567890"),
        [("1", "123456789012345678901234567890")],
    ),
    "beyond a float": (target("1e400"), [("1", "1" + "0" * 400)]),
    "true": (target("true"), [("1", "true")]),
    "white space round a target": (target('" 72\\n"'), [("1", "72")]),
    "an empty target": (target('""'), [("1", "")]),
    "messages": (chat('[{"role": "user", "content": "hi"}]'), [("hi", "2")]),
    "text parts": (
        chat('[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]'),
        [("hi", "2")],
    ),
    "messages in the column of the prompt": (
        b'{"prompt": [{"role": "user", "content": "hi"}], "target": 2}',
        [("hi", "2")],
    ),
    "CSV": (b"prompt,target\n1,2\n", [("1", "2")]),
    "CSV of another country": (b"prompt;target\r\n1,5;2\r\n", [("1,5", "2")]),
    "tabs": (b"\xef\xbb\xbfprompt\ttarget\n1\t2\n", [("1", "2")]),
    "CSV in gzip": (gzip.compress(b"prompt,target\n1,2\n"), [("1", "2")]),
    "CSV with quotes, an index and a blank line": (
        b',"prompt","target"\n0,"1, ""and""\n2","3"\n\n1,4,05\n',
        [('1, "and"\n2', "3"), ("4", "05")],
    ),
    "cells that pandas would change": (
        b"prompt,target\nNA,1e400\nnan,007\n",
        [("NA", "1e400"), ("nan", "007")],
    ),
    "a prompt beside messages": (b'{"prompt": "1", "messages": [], "target": "2"}', [("1", "2")]),
}


@pytest.mark.parametrize("name", READ)
def test_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    content, rows = READ[name]
    assert [(row.prompt, row.target) for row in load(content)] == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt": "a", "target": "a"},
            "`data.prompt` and `data.target` are the same column, 'a'",
        ),
        ({"solution": "target"}, "`data.target` and `data.solution` are the same column"),
        ({"prompt": ""}, "`data.prompt` must name a column"),
        ({"overlong": "x"}, "`JsonLines.overlong` must be 'refuse', 'skip' or 'cut', got 'x'"),
        ({"order": "up"}, "`JsonLines.order` must be 'shuffled' or 'file', got 'up'"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens` must be at least 1"),
        ({"validation_prompts": -3}, "validation_prompts` must be at least 1"),
        ({"validation_batch_size": 0}, "validation_batch_size` must be at least 1"),
        ({"split_seed": 2**70}, "split_seed` must be at most"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        JsonLines(**({"train": "a.jsonl"} | options))
