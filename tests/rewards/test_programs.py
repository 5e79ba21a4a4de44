"""From a response to a program, and from a row to its tests."""

from __future__ import annotations

import json

import pytest

from lightning_mpo.rewards.programs import code_of, job_of, joined

START = 'from typing import List\n\n\ndef f(x: int) -> int:\n    """Return x."""\n'
ROW = {
    "prompt": START,
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 1",
}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("~~~python\nx = 1\n~~~", "x = 1\n"),
        ("````python\nx = '```'\n````", "x = '```'\n"),
        ("```Python title=a.py\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nor better\n```python\nx = 2\n```\nthat is it", "x = 2\n"),
        ("```python\nx = 1\n```\nIt prints\n```text\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```\n\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("    return 1", "    return 1"),
        ("```bash\nls\n```", None),
        ("I cannot do that.", None),
        ("", None),
        ("```python\n```", None),
    ],
)
def test_code_of_a_response(text: str, code: str | None) -> None:
    assert code_of(text) == code


def test_a_response_of_empty_lines_takes_no_time() -> None:
    assert code_of("\n" * 300_000) is None


def value_of(text: str) -> object:
    """Return what the first text that compiles returns for 7."""
    for source in joined(START, "f", text):
        try:
            code = compile(source, "x", "exec")
        except SyntaxError:
            continue
        space: dict[str, object] = {}
        exec(code, space)
        return space["f"](7)  # type: ignore[operator]
    return "no program"


@pytest.mark.parametrize(
    "text",
    [
        "    return x",
        "    y = x\n    return y\n",
        "\n    return x",
        "return x",
        "y = x\n    return y",
        "y = x\nreturn y",
        "    return x\n\nprint(f(1)) # an example\nThis function returns x.",
        "    return x\n\ndef g():\n    pass",
        "def f(x):\n    return x",
        "import math\n\ndef f(x: int) -> int:\n    return x\n",
        "async_ = 1\nf = lambda x: x",
    ],
)
def test_a_body_or_the_function_once_more_is_joined(text: str) -> None:
    assert value_of(text) == 7


def test_a_start_without_a_docstring_is_joined() -> None:
    sources = joined("def f(x):\n", "f", "def f(x):\n    return x")
    with pytest.raises(SyntaxError):
        compile(sources[0], "x", "exec")
    compile(sources[1], "x", "exec")


def test_rows_as_in_humaneval() -> None:
    job = job_of(ROW, "    return x", each=False)
    assert job is not None
    assert job.entry == "f"
    assert job.tests[0].endswith("check(f)\n")
    assert job.sources[0] == START + "    return x"
    assert job.setup[0] == START


def test_the_start_of_a_program_is_a_text_with_its_head() -> None:
    row = {name: text for name, text in ROW.items() if name != "prompt"}
    sources = {}
    for prompt in (START, "Write f, please."):
        job = job_of(row, "    return x", each=False, prompt=prompt)
        assert job is not None
        sources[prompt] = job.sources[0]
    assert sources == {START: START + "    return x", "Write f, please.": "    return x"}
    prose = job_of(ROW | {"prompt": "Write f."}, "    return x", each=False, prompt=START)
    assert prose is not None
    assert prose.sources[0].startswith(START)


@pytest.mark.parametrize("write", [list, tuple, json.dumps])
def test_rows_as_in_mbpp(write) -> None:
    row = {
        "test_list": write(["assert f(1) == 1", "assert f(2) == 2"]),
        "test_setup_code": "import math",
    }
    job = job_of(row, "x = 1", each=True)
    assert job is not None
    assert job.tests == ("assert f(1) == 1", "assert f(2) == 2")
    assert (job.sources, job.setup, job.entry, job.each) == (
        ("x = 1",),
        ("import math",),
        None,
        True,
    )


def test_rows_with_inputs_and_outputs() -> None:
    job = job_of({"inputs": ["1", "2"], "outputs": ["a", "b"]}, "x = 1", each=False)
    assert job is not None
    assert job.cases == (("1", "a"), ("2", "b"))


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"test": "x"},
        {"test": None, "entry_point": "f"},
        {"test": "x", "entry_point": "f(); import os"},
        {"test_list": []},
        {"test_list": "[1, 2"},
        {"test_list": [1]},
        {"inputs": ["1"], "outputs": []},
        {"inputs": "1", "outputs": "1"},
    ],
    ids=repr,
)
def test_rows_without_tests(row: dict[str, object]) -> None:
    assert job_of(row, "x = 1", each=False) is None
