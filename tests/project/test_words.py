"""Words for readers: a short README, short sentences, and names that say their content."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "RESULTS")]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
README_WORDS = 900
SENTENCE_WORDS = 35
EMPTY_NAMES = {"said", "asked", "told", "found", "own", "kept", "named", "wanted"}
"""Names that do not say what they hold."""


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def words(text: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def paragraphs(text: str) -> list[str]:
    """Return paragraphs and items of lists, without headings, tables, pictures and code; a code span is one word."""
    found: list[str] = [""]
    for line in map(str.strip, without_code(text).splitlines()):
        if not line or line.startswith(("|", "#", "![")):
            found.append("")
        elif re.match(r"([*+-]|\d+\.) ", line):
            found.append(line)
        else:
            found[-1] = f"{found[-1]} {line}".strip()
    text = "\n".join(paragraph for paragraph in found if paragraph)
    text = re.sub(r"``[^`\n]*``|`[^`\n]*`", "Code", text).replace("**", "")
    text = re.sub(r"!?\[[^\]\n]*\.md\]\([^)\n]*\)", "Page", text)
    return re.sub(r"!?\[([^\]\n]*)\]\([^)\n]*\)", r"\1", text).splitlines()


def sentences(text: str) -> list[str]:
    """Split paragraphs behind a full stop, or one that a bracket or quote follows, before a capital.

    >>> sentences("One of `a.b`, say. Two (x. Y). *Three?* 4 follows; no end")
    ['One of Code, say.', 'Two (x.', 'Y).', '*Three?* 4 follows; no end']
    """
    end = r"(?<=[.!?])\s+(?=[\[(*\"“]*[A-Z])|(?<=[.!?][)*\"”])\s+(?=[\[(*\"“]*[A-Z])"
    return [sentence for paragraph in paragraphs(text) for sentence in re.split(end, paragraph)]


def empty_names(tree: ast.AST) -> set[str]:
    """Return the names of variables, arguments, attributes that are set, functions and classes that say nothing."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
    return names & EMPTY_NAMES


def sources() -> dict[str, Path]:
    paths = [
        path for folder in ("lightning_mpo", "callbacks") for path in (ROOT / folder).rglob("*.py")
    ]
    return {
        path.relative_to(ROOT).as_posix(): path
        for path in paths
        if not path.relative_to(ROOT).as_posix().startswith("lightning_mpo/callbacks/")
    }


def test_sentences_are_split_and_counted():
    assert sentences("One of `a.b`, say. Two (x). *Three?* And 4 follows; no end\n\n* five") == [
        "One of Code, say.",
        "Two (x).",
        "*Three?*",
        "And 4 follows; no end",
        "* five",
    ]
    assert words("a → b - `c`") == 3
    assert sentences("| a table. Row |\n\n```\nCode. More\n```\n# A heading. Yes") == []


def test_the_readme_is_short():
    assert words(without_code((ROOT / "README.md").read_text())) <= README_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sentences_are_short(page):
    long = [s for s in sentences(page.read_text()) if words(s) > SENTENCE_WORDS]
    assert long == []


def test_an_empty_name_is_seen():
    code = (
        "said = 1\ndef f(own, *, asked=2): self.kept = own\nx = [named for named in y]\nobj.told\n"
    )
    assert empty_names(ast.parse(code)) == {"said", "own", "asked", "kept", "named"}


def test_names_say_their_content():
    names = {name: empty_names(ast.parse(path.read_text())) for name, path in sources().items()}
    assert {name: empty for name, empty in names.items() if empty} == {}
