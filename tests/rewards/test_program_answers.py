"""Answers to rows of programs: right ones pass the tests of their row, changed ones do not."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_mpo.rewards.answers import Sample
from lightning_mpo.rewards.program_answers import (
    PROGRAMS,
    fenced,
    is_program,
    program_of,
    right_programs,
    with_results,
)
from lightning_mpo.types import PromptRow

HEAD = 'def double(x):\n    """Return twice x."""\n'
HUMAN_EVAL = PromptRow(
    "Complete this.",
    "",
    extra={
        "prompt": HEAD,
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    },
)
MBPP = PromptRow(
    "Write double.",
    "",
    extra={
        "code": "def double(x):\n    return x + x",
        "test_list": ["assert double(3) == 6"],
    },
)
CHAT = PromptRow(
    "Write double.",
    "",
    solution="Here:\n```python\ndef double(x):\n    return x * 2\n```\nDone.",
    extra={"test_list": ["assert double(3) == 6"]},
)


def passes(program: str) -> bool:
    names: dict[str, Any] = {}
    exec(program, names)
    return names["double"](3) == 6


@pytest.mark.parametrize("row", [HUMAN_EVAL, MBPP, CHAT], ids=["HumanEval", "MBPP", "chat"])
def test_the_program_of_a_row_is_right_and_without_results_wrong(row):
    assert is_program(row)
    program = program_of(row)
    assert passes(program)
    assert right_programs(row) == {"fenced": fenced(program), "plain": program}
    changed = with_results(program, "None")
    assert changed.startswith("def double(x):")
    assert not passes(changed)


def test_a_beginning_is_left_out_only_before_the_function_itself():
    extra = {
        **HUMAN_EVAL.extra,
        "canonical_solution": "    def double_of(y): return y + y\n    return double_of(x)\n",
    }
    assert program_of(PromptRow("p", "", extra=extra)).startswith(HEAD)


def test_results_that_equal_all_pass_tests_in_their_own_process():
    kind = next(kind for kind in PROGRAMS if "equals all" in kind.name)
    for row in (HUMAN_EVAL, MBPP, CHAT):
        assert passes(kind.write(Sample(row, program_of(row))))


def test_rows_of_other_tasks_are_no_programs():
    math = PromptRow("1+1=", "2", extra={"test": True, "solution": "1+1=2", "inputs": "x"})
    assert not is_program(math)
    assert all(kind.write(Sample(math, "2")) is None for kind in PROGRAMS)
    assert is_program(PromptRow("p", "", extra={"inputs": ["1"], "outputs": ["2"]}))


def test_a_row_with_tests_and_no_program_has_no_right_answer():
    row = PromptRow("p", "", extra={"test_list": ["assert f(1) == 1"]})
    assert right_programs(row) == {}
    written = {kind.name: kind.write(Sample(row)) for kind in PROGRAMS}
    assert written.pop("program: returns None") is None
    assert written["program: exits with 0"] == "```python\nimport sys\nsys.exit(0)\n```"


def test_programs_are_written_as_the_right_one_is():
    for gold, is_fenced in (("```python\nx\n```", True), ("x", False)):
        for kind in PROGRAMS[:-1]:
            assert ("```" in kind.write(Sample(MBPP, gold))) == is_fenced
    assert "```" not in PROGRAMS[-1].write(Sample(MBPP, "```python\nx\n```"))


@pytest.mark.parametrize("program", ["def f(x):\n    print(x)", "def f(", "x = 1", "\0"])
def test_without_a_result_there_is_no_changed_program(program):
    assert with_results(program, "None") is None
