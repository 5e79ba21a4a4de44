"""Prompt, target and solution from columns and from templates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lightning_mpo.data.columns import Columns, is_template
from lightning_mpo.data.reading import read_rows
from lightning_mpo.errors import UserError

RECORD = {"question": "1 + 1?", "answer": "It is 2.\n#### 2", "hint": None, "level": 3}


def test_a_text_with_braces_is_a_template() -> None:
    assert [
        is_template(text) for text in ("question", "{{ question }}", "{% if a %}b{% endif %}")
    ] == [
        False,
        True,
        True,
    ]


def test_templates_and_columns_mix() -> None:
    columns = Columns("Q: {{ question }}\nA:\n", "{{ answer.split('####')[-1] }}", "answer")
    row = columns.row(RECORD, "row 1")
    assert (row.prompt, row.target, row.solution) == ("Q: 1 + 1?\nA:\n", "2", "It is 2.\n#### 2")
    assert dict(row.extra) == RECORD, "a reward sees the columns alone"
    assert row.where == "row 1"


def test_optional_columns_and_loops() -> None:
    text = "{% if hint %}{{ hint }}{% endif %}{{ other if other is defined }}{{ level * 2 }}"
    assert Columns(text, None).row(RECORD, "").prompt == "6"
    listed = Columns("{% for x in xs %}{{ loop.index }}. {{ x }}\n{% endfor %}", None)
    assert listed.row({"xs": ["a", "b"]}, "").prompt == "1. a\n2. b\n"


def test_numbers_keep_their_digits(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 0.50, "y": 1e400}')
    ((_, record),) = read_rows(str(tmp_path / "a.jsonl"))
    assert Columns("{{ x }} {{ y }}", None).row(record, "").prompt == "0.50 1e400"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{{ question", r"`data.prompt` is not a valid Jinja template: .* \(line 1\)$"),
        ("a\n{% if %}", r"`data.prompt` is not a valid Jinja template: .* \(line 2\)$"),
        (
            "{{ questoin }}",
            "row 7 has no 'questoin'; its columns are 'question', .*; did you mean 'question'.; the template `data.prompt`",
        ),
        ("{{ hint }}", "row 7: the template `data.prompt` writes a null; write {{ COLUMN or '' }}"),
        ("{{ level.name }}", "row 7: the template `data.prompt` fails: .* has no attribute 'name'"),
        ("{{ 1 / 0 }}", "row 7: the template `data.prompt` fails: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "row 7: the template `data.prompt` fails: access to attribute"),
        ("{% for i in range(10**9) %}x{% endfor %}", "row 7: the template `data.prompt` fails: Range too big"),
        ("{{ '' }}", "row 7: .* is empty; write a prompt"),
    ],
)  # fmt: skip
def test_templates_that_fail_end_in_one_line(prompt: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        Columns(prompt, None).row(RECORD, "row 7")
    assert re.search(message, str(refusal.value)), refusal.value
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("record", [[1], None, "text"])
def test_a_row_that_is_no_object(record: Any) -> None:
    for prompt in ("question", "{{ question }}"):
        with pytest.raises(UserError, match="row 1 must be an object with columns"):
            Columns(prompt).row(record, "row 1")


def test_a_wide_table_lists_its_first_columns() -> None:
    with pytest.raises(UserError) as refusal:
        Columns("x").row({f"column {i}": 1 for i in range(500)}, "row 1")
    assert len(str(refusal.value)) < 450
    assert str(refusal.value).endswith("'column 19', …")
