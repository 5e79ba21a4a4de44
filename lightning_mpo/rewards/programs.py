"""From a response to a program, and from a row of the data to its tests."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mpo.rewards.sandbox import Job

TAGS = ("python", "py", "python3", "")
CODE = re.compile(
    r"^[ \t]*(def|class|import|from|return|for|while|if|print|with|try)\b|=", re.MULTILINE
)
KINDS = (("test", "entry_point"), ("test_list",), ("inputs", "outputs"))
"""Columns of tests: as in HumanEval, as in MBPP, and of programs that read and print."""


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Return tag and content of each fenced block. A block that is not closed ends with the text.

    Example:
        >>> fenced_blocks("Here:\\n```python\\nx = 1\\n```\\nor\\n```\\ny")
        [('python', 'x = 1\\n'), ('', 'y')]
    """
    blocks: list[tuple[str, list[str]]] = []
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = line.strip()
        if fence:
            if mark == fence:
                fence = ""
            else:
                blocks[-1][1].append(line)
        elif mark.startswith(("```", "~~~")):
            fence = mark[: len(mark) - len(mark.lstrip(mark[0]))]
            blocks.append((mark[len(fence) :].strip().lower(), []))
    return [(tag, "".join(lines)) for tag, lines in blocks]


def code_of(text: str) -> str | None:
    """Return the program text of a response: its last Python block, or all of it without a block.

    Returns:
        None if there are blocks of other languages alone, or plain prose.

    Example:
        >>> code_of("First\\n```python\\nx = 1\\n```\\nDone."), code_of("The answer is five.")
        ('x = 1\\n', None)
    """
    blocks = fenced_blocks(text)
    if not blocks:
        return text if CODE.search(text) else None
    codes = [code for tag, code in blocks if tag.partition(" ")[0] in TAGS and code.strip()]
    return codes[-1] if codes else None


def joined(start: str, name: str, code: str) -> tuple[str, ...]:
    """Return program texts from the start of a program and its continuation, the likeliest first.

    Args:
        start: imports, and the head of a function with its docstring.
        name: of the function.
        code: the body of the function, or the function once more.

    Example:
        >>> joined("def f():\\n", "f", "    return 1\\nf()")[1]
        'def f():\\n    return 1\\n'
    """
    if not start:
        return (code,)
    if defines(code, name):
        return (f"{start}\n{code}", f"{start}\n    pass\n{code}", code)
    lines = code.splitlines(keepends=True)
    foreign = (i for i, line in enumerate(lines) if line.strip() and not line[0].isspace())
    body = "".join(lines[: next(foreign, len(lines))])
    first = "" if start.endswith("\n") or code.startswith("\n") else "\n"
    texts = [code, body, f"    {code.lstrip()}", textwrap.indent(code, "    ")]
    return tuple(start + first + text for text in texts if text.strip())


def defines(code: str, name: str) -> bool:
    """Return whether a text has the head of a function or class of this name, or assigns to it.

    Example:
        >>> defines("def f_2():\\n    pass", "f"), defines("f = max", "f")
        (False, True)
    """
    head = rf"^(async\s+def|def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*="
    return re.search(head, code, re.MULTILINE) is not None


def job_of(row: Mapping[str, Any], code: str, each: bool, prompt: str = "") -> Job | None:
    """Return the program with the tests of its row.

    Args:
        row: all columns; `KINDS` lists those of tests.
        code: the program text of a response.
        each: assertions or cases count one by one.
        prompt: start of the program, where the row has no column `prompt`.

    Returns:
        None if the row has no tests.
    """
    test, entry = row.get("test"), row.get("entry_point")
    if isinstance(test, str) and isinstance(entry, str) and entry.isidentifier():
        texts = [text for text in (row.get("prompt"), prompt) if isinstance(text, str)]
        start = next((text for text in texts if defines(text, entry)), "")
        tests = (f"{test}\n\ncheck({entry})\n",)
        setup = (start, f"{start}\n    pass\n", "")
        return Job(joined(start, entry, code), (), tests, setup, entry, each)
    listed = _texts(row.get("test_list"))
    if listed:
        lines = [*_texts(row.get("test_imports")), str(row.get("test_setup_code") or "")]
        return Job((code,), (), listed, ("\n".join(lines),), None, each)
    inputs, outputs = _texts(row.get("inputs")), _texts(row.get("outputs"))
    if inputs and len(inputs) == len(outputs):
        return Job((code,), tuple(zip(inputs, outputs, strict=True)), each=each)
    return None


def _texts(column: Any) -> tuple[str, ...]:
    """Return a list of texts, which may be written as JSON."""
    if isinstance(column, str) and column.lstrip().startswith("["):
        try:
            column = json.loads(column)
        except ValueError:
            return ()
    if isinstance(column, str) or not isinstance(column, Sequence):
        return ()
    return tuple(column) if all(isinstance(text, str) for text in column) else ()
