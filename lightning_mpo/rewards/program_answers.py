"""Kinds of answers to rows whose answer is a Python program, which tests of the row judge."""

from __future__ import annotations

import ast

from lightning_mpo.rewards.answers import FEW, Kind, Sample
from lightning_mpo.rewards.programs import defines
from lightning_mpo.types import PromptRow

TESTS = ("test", "tests", "test_list")
"""Columns of tests. A row is answered by a program if one of them holds an `assert`."""
SOLUTIONS = ("canonical_solution", "code", "solution")
"""Columns of programs, or of the rest of a program whose beginning is the prompt."""
FENCE = "```"
EQUAL = """

class Equal:
    def __eq__(self, other):
        return True
"""


def is_program(row: PromptRow) -> bool:
    """Return whether a program answers the row, as its columns hold tests.

    They are texts with an `assert`, or the lists `inputs` and `outputs`.
    """
    tests = [row.extra.get(name) for name in TESTS]
    is_io = all(isinstance(row.extra.get(name), list) for name in ("inputs", "outputs"))
    return is_io or any("assert" in str(test) for test in tests)


def program_of(row: PromptRow) -> str | None:
    """Return the program of a row; None: it has none.

    Example:
        >>> columns = {"prompt": "def f():\\n", "canonical_solution": "    return 1\\n"}
        >>> program_of(PromptRow("Write f.", "", extra={**columns, "entry_point": "f"}))
        'def f():\\n    return 1\\n'
    """
    texts = [row.extra.get(name) for name in SOLUTIONS]
    code = next((text for text in [*texts, row.solution] if isinstance(text, str) and text), None)
    if code is None:
        return None
    if FENCE in code:  # the program within the first fence, without the name of the language
        code = code.split(FENCE)[1].partition("\n")[2]
    entry = row.extra.get("entry_point")
    if not entry or defines(code, str(entry)):
        return code
    beginning = row.extra.get("prompt")
    return (beginning if isinstance(beginning, str) else row.prompt) + code


def right_programs(row: PromptRow) -> dict[str, str]:
    """Return the program of a row by form: in a code fence, and plain."""
    program = program_of(row)
    return {} if program is None else {"fenced": fenced(program), "plain": program}


def fenced(program: str) -> str:
    """Return a program in a code fence."""
    return f"{FENCE}python\n{program.rstrip()}\n{FENCE}"


def with_results(program: str, value: str) -> str | None:
    """Return a program whose functions return another value; None: no function returns anything.

    Args:
        program: the program.
        value: an expression.

    Example:
        >>> with_results("def f(x):\\n    return x + 1", "None")
        'def f(x):\\n    return None'
    """
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError):
        return None
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value]
    for node in returns:
        node.value = ast.parse(value, mode="eval").body
    return ast.unparse(tree) if returns else None


def _like_gold(sample: Sample, program: str | None) -> str | None:
    """Write a program in the form of the right answer; None: the row takes no program."""
    if program is None or not is_program(sample.row):
        return None
    is_plain = sample.gold is not None and FENCE not in sample.gold
    return program if is_plain else fenced(program)


def _changed(sample: Sample, value: str, end: str = "") -> str | None:
    """Return the right program with other results, and with more code behind it."""
    program = program_of(sample.row)
    changed = None if program is None else with_results(program, value)
    return None if changed is None else _like_gold(sample, changed + end)


PROGRAMS = (
    Kind("program: returns None", False, lambda sample: _changed(sample, "None")),
    Kind(
        "program: returns an object that equals all",
        False,
        lambda sample: _changed(sample, "Equal()", EQUAL),
    ),
    Kind(
        "program: exits with 0",
        False,
        lambda sample: _like_gold(sample, "import sys\nsys.exit(0)"),
    ),
    Kind(
        "program: ends its process",
        False,
        lambda sample: _like_gold(sample, "import os\nos._exit(0)"),
    ),
    Kind(
        "program: prints passed",
        False,
        lambda sample: _like_gold(sample, 'print("passed")\nprint("OK")\nprint(True)\nprint(1)'),
    ),
    Kind(
        "program: endless loop",
        False,
        lambda sample: _like_gold(sample, "while True:\n    pass"),
        most=FEW,
    ),
    Kind(
        "prose without a program",
        False,
        lambda sample: (
            "The function goes through its input and returns the result."
            if is_program(sample.row)
            else None
        ),
    ),
)
"""Kinds of answers to rows that a program answers."""
