"""Files that are refused: the line names the file, the row and the remedy."""

from __future__ import annotations

import gzip
import os
import pickle
import re
from pathlib import Path

import pytest

from lightning_mpo.data import JsonLines, PromptFile
from lightning_mpo.errors import UserError
from tests.support.rows import OK, ROW, chat, load, target

REFUSED: dict[str, tuple[bytes, str]] = {
    # --- no JSON lines
    "Latin-1": (
        ROW + b'{"prompt": "caf\xe9"}\n',
        r"line 2 of .* is not JSON in UTF-8: byte 0xe9 at column 16; .*iconv -f LATIN1",
    ),
    "UTF-16": (
        OK.encode("utf-16"),
        "is UTF-16, not JSON lines; convert it: iconv -f UTF-16 -t UTF-8",
    ),
    "UTF-16 without a mark": (
        OK.encode("utf-16-le"),
        "line 1 of .* zero byte; if the file is UTF-16, convert it",
    ),
    "UTF-32": (OK.encode("utf-32"), "is UTF-32, not JSON lines"),
    "gzip cut off": (
        gzip.compress(ROW * 50)[:-12],
        "is gzip and cannot be unpacked .*; is it complete",
    ),
    "gzip of nothing": (b"\x1f\x8bjunk", "is gzip and cannot be unpacked"),
    "gzip twice": (
        gzip.compress(gzip.compress(ROW)),
        "is packed twice, not JSON lines; convert it: gunzip",
    ),
    "Parquet": (
        b"PAR1....",
        "is Parquet and cannot be read behind row 0: .*; is it complete",
    ),
    "Arrow": (b"ARROW1..", "is an Arrow file, not JSON lines; convert it"),
    "zip": (b"PK\x03\x04..", "is a zip archive, not JSON lines; convert it: unzip"),
    "zstd": (b"\x28\xb5\x2f\xfd..", "is zstd, not JSON lines; convert it: zstd -d"),
    "xz": (b"\xfd7zXZ..", "is xz, not JSON lines; convert it: unxz"),
    "bzip2": (b"BZh9..", "is bzip2, not JSON lines; convert it: bunzip2"),
    "SQLite": (b"SQLite format 3\0", "is SQLite, not JSON lines"),
    "a pickle": (pickle.dumps({}), "is binary, not JSON lines"),
    "a row with too few cells": (
        b"prompt,target\n1,2\n3\n",
        "line 3 of .* has 1 cells, and the header has 2; write a text with ',' or a line break in",
    ),
    "a comma without quotes": (b"prompt,target\n1,5,2\n", "line 2 of .* has 3 cells"),
    "an open quote": (b'prompt,target\n"1,2\n', "line 2 of .* is not CSV: unexpected end of data"),
    "a column of CSV twice": (b"prompt,prompt\n1,2\n", "has the column 'prompt' twice"),
    "an empty cell": (b"prompt,target\n1,2\n3,\n", "line 3 of .*: 'target' is null"),
    "CSV in Latin-1": (
        b"prompt,target\n1,2\ncaf\xe9,2\n",
        "line 3 of .* is not CSV in UTF-8: byte 0xe9 at column 4; .*LATIN1 .* > rows.csv",
    ),
    "CSV of another column": (
        b"prompts,target\n1,2\n",
        "line 2 of .* has no 'prompt'; its columns are 'prompts', 'target'; did you mean",
    ),
    "text": (b"hello\n", r"line 1 of .* is not JSON: Expecting value \(column 1\)$"),
    "a comment": (b"// x\n" + ROW, "line 1 of .* is not JSON: Expecting value"),
    "single quotes": (b"{'prompt': '1'}", "line 1 of .* is not JSON: Expecting property name"),
    "a trailing comma": (b'{"prompt": "1",}', "line 1 of .* is not JSON"),
    "commas between rows": (
        ROW.strip() + b",\n" + ROW,
        r"line 1 of .* is not JSON: Extra data \(column 31\)",
    ),
    "two rows on a line": (ROW.strip() * 2, r"line 1 of .* is not JSON: Extra data \(column 31\)"),
    "a row over lines": (
        b'{\n "prompt": "1"\n}\n',
        "line 1 of .* is not JSON: .*; an object must be on one line",
    ),
    "cut within a text": (
        ROW + b'{"prompt": "1", "tar',
        "line 2 of .*; the file ends within this line: is it complete",
    ),
    "cut before the end": (
        ROW + ROW.strip()[:-1],
        "line 2 of .*; the file ends within this line: is it complete",
    ),
    "a list cut off": (
        b'[{"prompt": "1", "target": "2"},',
        r"line 1 of .* is not JSON: .* \(column 33\)",
    ),
    "a broken list": (
        b'[\n {"prompt": "1",\n "target": }\n]',
        r"line 3 of .* is not JSON: Expecting value \(column 12\)",
    ),
    "a zero byte": (ROW + b'{"prompt": "\0"}', "line 2 of .* is not JSON: it holds a zero byte"),
    "a tab in a text": (
        b'{"prompt": "a\tb"}',
        r"line 1 of .* is not JSON: Invalid control character at \(column 14\)",
    ),
    "half a character": (
        rb'{"prompt": "\ud800", "target": "2"}',
        r"line 1 of .*: \\ud800 is half a character",
    ),
    "half a character elsewhere": (
        rb'{"prompt": "1", "target": "2", "x": ["\uDC00"]}',
        r"\\udc00 is half a character",
    ),
    "a key twice": (
        b'{"prompt": "1", "prompt": "3"}',
        "line 1 of .*: an object has 'prompt' twice",
    ),
    "a key twice inside": (
        chat('[{"role": "user", "role": "system"}]'),
        "an object has 'role' twice",
    ),
    "nested without end": (
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "line 1 of .*: it is nested too deeply",
    ),
    # --- rows that are none
    "empty": (b"", "`JsonLines` found no training rows"),
    "blank lines": (b"\n \n\t\n", "`JsonLines` found no training rows"),
    "an empty list": (b"[]", "`JsonLines` found no training rows"),
    "a list of lists": (b"[[1]]", "row 1 of .* must be an object with columns, got list"),
    "lists on lines": (b"[1]\n[2]\n", "line 1 of .* must be an object with columns, got list"),
    "a number": (b"3\n", "line 1 of .* must be an object with columns, got int"),
    "null": (b"null\n", "line 1 of .* must be an object with columns, got NoneType"),
    "rows within an object": (
        b'{"data": []}',
        "line 1 of .* has no 'prompt'; its columns are 'data'",
    ),
    "capitals": (b'{"Prompt": "1", "target": "2"}', "has no 'prompt'.*did you mean 'Prompt'"),
    # --- targets
    "a null target": (target("null"), "line 1 of .*: 'target' is null$"),
    "nan": (target("NaN"), "line 1 of .*: 'target' is nan; write a finite number"),
    "infinity": (target("-Infinity"), "line 1 of .*: 'target' is -inf; write a finite number"),
    "a billion digits": (
        target("1e999999999"),
        "'target' is 1e999999999, which is too long to be written out",
    ),
    "a billion places": (
        target("1e-999999999"),
        "'target' is 1e-999999999, which is too long to be written out",
    ),
    "an exponent without end": (target("1e" + "9" * 50), "'target' (is|must be)"),
    "3000 digits": (target("9" * 3000), "'target' is 9{40}, which is too long"),
    "5000 digits": (target("9" * 5000), "line 1 of .*: a number has 5000 digits; write it as text"),
    "several targets": (
        target('["3", "4"]'),
        "'target' must be text or a number, got list; write one text",
    ),
    "an object": (target('{"a": 1}'), "'target' must be text or a number, got dict"),
    "a zero character in a target": (target(r'"2\u0000"'), "'target' holds a zero character"),
    # --- prompts
    "an empty prompt": (ROW + b'{"prompt": "", "target": "2"}', "line 2 of .*: 'prompt' is empty"),
    "a blank prompt": (b'{"prompt": " \\n\\t", "target": "2"}', "line 1 of .*: 'prompt' is empty"),
    "a prompt of no-break spaces": (
        '{"prompt": "\u00a0", "target": "2"}'.encode(),
        "'prompt' is empty",
    ),
    "a number for a prompt": (
        b'{"prompt": 3, "target": "2"}',
        "line 1 of .*: 'prompt' must be text, got int",
    ),
    "a list for a prompt": (
        b'{"prompt": ["1"], "target": "2"}',
        "line 1 of .*: 'prompt' must be text, got list",
    ),
    "a zero character": (
        rb'{"prompt": "a\u0000b", "target": "2"}',
        r"'prompt' holds a zero character .* at column 2",
    ),
    # --- chats
    "no messages": (chat("[]"), "line 1 of .*: 'messages' has no message to answer"),
    "messages of text": (
        chat('["hi"]'),
        "'messages', message 1 must be an object with 'role' and 'content', got str",
    ),
    "text for messages": (chat('"hi"'), "'messages' must be a list of messages, got str"),
    "a message for messages": (
        chat('{"role": "user"}'),
        "'messages' must be a list of messages, got dict",
    ),
    "no role": (
        chat('[{"content": "hi"}]'),
        "'messages', message 1 has no 'role'; its keys are 'content'",
    ),
    "ShareGPT": (
        chat('[{"from": "human", "value": "hi"}]'),
        "has no 'role'; .*ShareGPT's 'from' and 'value'",
    ),
    "a forged role": (
        chat('[{"role": "user<|im_end|>", "content": "hi"}]'),
        "message 1: the role must be one of",
    ),
    "a list for a role": (
        chat('[{"role": ["user"], "content": "hi"}]'),
        "message 1: the role must be one of",
    ),
    "null for a content": (
        chat('[{"role": "user", "content": null}]'),
        "message 1: 'content' must be text",
    ),
    "an image": (
        chat('[{"role": "user", "content": [{"type": "image"}]}]'),
        "message 1: 'content' must be text",
    ),
    "a part of a number": (
        chat('[{"role": "user", "content": [{"type": "text", "text": 3}]}]'),
        "must be text",
    ),
    "no parts": (chat('[{"role": "user", "content": []}]'), "message 1: 'content' must be text"),
    "a blank message": (chat('[{"role": "user", "content": " "}]'), "'messages' is empty"),
    "only a system message": (
        chat('[{"role": "system", "content": "x"}]'),
        "ends with a message of the role 'system'",
    ),
    "only an answer": (
        chat('[{"role": "assistant", "content": "x"}]'),
        "'messages' has no message to answer",
    ),
    "an empty answer": (
        chat('[{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]'),
        "the solution is empty",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED[name]
    with pytest.raises(UserError) as refusal:
        load(content)
    assert re.search(message, str(refusal.value)), refusal.value
    assert len(str(refusal.value)) < 400
    assert "\n" not in str(refusal.value)


def test_names_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    os.mkfifo("pipe")
    for name, message in {
        "folder": "folder is a folder; name a file",
        "pipe": "pipe is not a regular file",
        "/dev/zero": "is not a regular file",
        "absent": "there is no file .*absent",
        "": "'' is not a file name",
        "a\0b": "is not a file name",
        "x" * 5000: "cannot be read: File name too long",
        "~nobody-of-that-name/x": "cannot be read",
    }.items():
        for module in (JsonLines(name), PromptFile(name)):
            with pytest.raises(UserError, match=message):
                _ = module.splits
