"""Chat templates that fail, loop or refuse a row end in one line."""

from __future__ import annotations

import threading
import time

import pytest

from lightning_mpo.data import limits, rendering
from lightning_mpo.data.limits import TimeLimitError, first_failure, time_limit
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow
from tests.support.chats import make_tokenizer, render

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('Roles must alternate') }}",
            "cannot render the prompt '1': Roles must alternate$",
        ),
        (
            "{{ raise_exception('Give a system message') }}",
            "Give a system message; `data.system` gives a system message",
        ),
        ("{{ raise_exception('two\nlines') }}", "two lines$"),
        ("{% for m in", "TemplateSyntaxError"),
        ("{{ messages[3].content }}", "UndefinedError"),
        ("{{ messages.x.y }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 10**12 }}", "MemoryError"),
        ("{% include 'x' %}", "cannot render"),
        ("{# nothing #}", "the prompt '1' has no tokens"),
        ("{% macro a(x) %}{{ a(x) }}{% endmacro %}{{ a(1) }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_ends_in_one_line(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        render("1", tokenizer=make_tokenizer(template))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_a_template_that_loops_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CPU_SECONDS", 1)
    with pytest.raises(
        UserError, match="cannot render the prompt '1': it takes over 1 s, or over 2 GiB"
    ):
        render("1", tokenizer=make_tokenizer(LOOP))
    monkeypatch.setattr(rendering, "first_failure", lambda calls: None)
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.5)
    with pytest.raises(UserError, match="cannot render the prompt '1': it takes over 0 s"):
        render("1", tokenizer=make_tokenizer(LOOP))


def test_a_row_that_the_template_refuses_is_named_before_the_first_step() -> None:
    picky = "{% for m in messages %}{% if 'x' in m.content %}{{ raise_exception('No x') }}{% endif %}{% endfor %}1"
    rows = [
        PromptRow(text, "1", where=f"line {i} of a.jsonl") for i, text in enumerate("abxc", start=1)
    ]
    with pytest.raises(
        UserError, match=r"cannot render the prompt 'x' \(line 3 of a.jsonl\): No x"
    ):
        render(*rows, tokenizer=make_tokenizer(picky))


def test_calls_in_a_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_failure([]) is None
    assert first_failure([lambda: 1, lambda: 2]) is None
    assert first_failure([lambda: 1, lambda: 1 / 0]) == (1, "ZeroDivisionError: division by zero")
    assert first_failure([lambda: bytearray(2**36)]) == (0, "MemoryError")
    monkeypatch.setattr(limits, "CPU_SECONDS", 1)
    assert (
        first_failure([lambda: 1, lambda: 10 ** (10**9)])[1] == "it takes over 1 s, or over 2 GiB"
    )  # type: ignore[index]


def test_a_time_limit_holds_in_any_thread() -> None:
    caught: list[BaseException] = []

    def loop() -> None:
        try:
            with time_limit(0.1):
                while True:
                    pass
        except TimeLimitError as error:
            caught.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join(20)
    assert len(caught) == 1
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing is raised behind the block
