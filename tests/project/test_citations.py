"""Citations open: sections of docs/algorithms.md, evidence tags of one table, and no document from elsewhere."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

from lightning_mpo.recipes.headers import TAGS
from tests.support.citations import PAGE, ROOT, citations, files, read, sections

ELSEWHERE = re.compile(
    r"(?:core|related)[- ](?:algorithms|design|spec)|(?:core|related) \d|\bthe (?:spec|specification)\b"
    r"|\bdesign section|(?<!docs/)\balgorithms(?:\.md)? \d|house\.md",
    re.IGNORECASE,
)
BRACKET = re.compile(r"(?<!\w)\[([^\[\]]*)\](?!\()")
SPAN = r"``.*?``|`[^`]*`"
FORMER = {"CODE", "INF", "2ND", "AB", "NUM", "PT"}


def prose(path: Path) -> Iterator[str]:
    """Yield what a file says in words: docstrings and comments, or Markdown without code."""
    text = read(path)
    if path.suffix == ".md":
        yield re.sub(SPAN, "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    elif path.suffix == ".yaml":
        for comment, lines in groupby(text.splitlines(), key=lambda line: line.startswith("#")):
            if comment:
                yield " ".join(line.removeprefix("#").strip() for line in lines)
        yield from re.findall(r"\S.*\s#(.*)", text)
    else:
        yield from python_prose(text)


@cache
def python_prose(text: str) -> list[str]:
    """Return the docstrings and comments of a module, without code in backticks."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            found.append(re.sub(r"^ *(>>>|\.\.\.).*\n.*", "", node.value.value, flags=re.MULTILINE))
    if re.search(r"#.*\[[A-Z0-9]|#.*\.(?:md|py|yaml)", text):  # tokens are slow
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        found += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [re.sub(SPAN, "", part) for part in found]


def stray_tags(text: str) -> list[str]:
    """Return the brackets that look like evidence and are not written with a tag of the table.

    A bracket counts as evidence if its first word is in capitals; shapes such as `[B, T]` begin with a letter that is no
    tag. Behind a tag stands nothing, or a comma or semicolon.
    """
    found = []
    for inner in BRACKET.findall(text):
        word = re.match(r"[A-Z0-9]*[A-Z][A-Z0-9]*\b", inner)
        if word is None:
            continue
        known = word[0] in TAGS
        behind = inner[word.end() :].strip()
        shape = not known and len(word[0]) == 1 and behind
        wrong = (known and behind and behind[0] not in ",;") or FORMER & set(
            re.findall(r"\w+", inner)
        )
        if wrong or not (known or shape):
            found.append(f"[{inner}]")
    return found


# --- the finders are right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[CODE]",
        "[INF]",
        "[2ND]",
        "[AB]",
        "[NUM]",
        "[P 6]",
        "[P abstract]",
        "[TRL] read",
        "[C, INF]",
        "see [X]",
        "[PT, a]",
    ],
)
def test_a_tag_of_another_alphabet_is_seen(text):
    assert stray_tags(f"A fact {text}. More.") == [text.removesuffix(" read").removeprefix("see ")]


@pytest.mark.parametrize(
    "text",
    [
        "[C]",
        "[P, C]",
        "[P][C]",
        "[C, TRL and verl; paper: 0.04, REC]",
        "[I; x]",
        "shape [B, T]",
        "[0, 1)",
        "x[B]",
        "[A](b)",
    ],
)
def test_a_tag_of_the_table_and_what_is_no_tag_are_let_go(text):
    assert stray_tags(f"A fact {text}. More.") == []


def test_prose_is_docstrings_and_comments():
    code = 'X = "[CODE]"  # a note [INF]\n"""Of `[AB]` and [NUM]."""\n\ndef f():\n    """[2ND]\n\n    >>> f()\n    [PT]\n    """\n'
    assert sorted(tag for text in python_prose(code) for tag in stray_tags(text)) == [
        "[2ND]",
        "[INF]",
        "[NUM]",
    ]


@pytest.mark.parametrize(
    "text",
    ["core-algorithms 1.4", "related spec 9.4", "core 1.6", "algorithms 3.2", "Core specification"],
)
def test_a_document_from_elsewhere_is_seen(text):
    assert ELSEWHERE.search(f"As in {text}.")
    assert not ELSEWHERE.search(
        "As in docs/algorithms.md 3.2, a spec of the core; algorithms are files."
    )


# --- the repository -----------------------------------------------------------------------------------------------------


def test_every_citation_opens():
    page, count, closed = sections(read(PAGE)), 0, []
    for path in files():
        for number, invariants in citations(read(path)):
            count += 1
            missing = [
                n
                for n in invariants
                if not re.search(rf"^{n}\. ", page.get(number, ""), re.MULTILINE)
            ]
            if number not in page or missing:
                closed.append((str(path.relative_to(ROOT)), number, missing))
    assert closed == []
    assert count > 100, "the finder finds too few"


def test_a_citation_names_a_section():
    loose = re.compile(r"docs/algorithms\.md(?! \d)(?!\s*(`|\)|#|$))", re.MULTILINE)
    bare = [
        str(path)
        for path in files()
        if path.suffix in (".py", ".yaml") and loose.search(read(path))
    ]
    assert bare == []


def test_evidence_has_tags_of_one_table():
    stray = [
        (str(path.relative_to(ROOT)), tag)
        for path in files()
        for text in prose(path)
        for tag in stray_tags(text)
    ]
    assert stray == []


def test_no_document_outside_of_the_repository_is_cited():
    cited = [
        (str(path.relative_to(ROOT)), found[0])
        for path in files()
        for found in ELSEWHERE.finditer(read(path))
    ]
    assert cited == []


def test_every_page_that_is_named_exists():
    named = re.compile(
        r"(?<![\w/.*])((?:docs|tests|configs|benchmarks)/[\w/.-]*\w\.(?:md|py|yaml))\b"
    )
    missing = [
        (str(path.relative_to(ROOT)), name)
        for path in files()
        if path.suffix == ".md" or path.parts[-2] not in ("tests", "benchmarks")
        for text in ([read(path)] if path.suffix == ".md" else prose(path))
        for name in named.findall(text)
        if not (ROOT / name).is_file()
    ]
    assert missing == []
