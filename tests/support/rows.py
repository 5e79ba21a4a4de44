"""Rows of files as lines of JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_mpo.data import JsonLines

OK = '{"prompt": "1", "target": "2"}\n'
ROW = OK.encode()


def target(value: str) -> bytes:
    return b'{"prompt": "1", "target": ' + value.encode() + b"}"


def chat(messages: str) -> bytes:
    return b'{"target": "2", "messages": ' + messages.encode() + b"}"


def load(content: bytes) -> Any:
    """Return the rows of a file in the working folder."""
    Path("rows.jsonl").write_bytes(content)
    return JsonLines("rows.jsonl", validation_share=0).splits.train
