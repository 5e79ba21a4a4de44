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
from typing import Any

import pytest
import yaml

from lightning_mpo.recipes.headers import TAGS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "algorithms.md"
FUNCTIONAL = ROOT / "lightning_mpo" / "functional"
FOLDERS = ("lightning_mpo", "callbacks", "tests", "benchmarks", "configs", "docs", "docker")
EQUATIONS = [
    "actions",
    "advantages",
    "corrections",
    "diagnostics",
    "divergences",
    "groups",
    "heads",
    "lengths",
    "reductions",
    "selections",
    "supports",
    "support_diagnostics",
    "surrogates",
    "trust_regions",
    "values",
]
"""Files of functional/ each of whose functions the page names."""
AXES = {
    "supports": "2",
    "action_spaces": "3",
    "segmenters": "3.5",
    "advantages": "4",
    "surrogates": "5",
    "selection": "6",
    "reductions": "7",
    "kl": "8",
    "corrections": "9",
    "value_loss": "10",
    "terms": "12",
}
"""Files of axes, and the chapter of each."""

SECTION = r"\d+(?:\.\d+)?"
CITATION = re.compile(
    rf"docs/algorithms\.md\s+({SECTION}(?:(?:,| and| to)\s+{SECTION})*)"
    r"(?:,\s+invariants?\s+(\d+(?:(?:,| and)\s+\d+)*))?"
)
ELSEWHERE = re.compile(
    r"(?:core|related)[- ](?:algorithms|design|spec)|(?:core|related) \d|\bthe (?:spec|specification)\b"
    r"|\bdesign section|(?<!docs/)\balgorithms(?:\.md)? \d|house\.md",
    re.IGNORECASE,
)
BRACKET = re.compile(r"(?<!\w)\[([^\[\]]*)\](?!\()")
SPAN = r"``.*?``|`[^`]*`"
FORMER = {"CODE", "INF", "2ND", "AB", "NUM", "PT"}


# --- finders ------------------------------------------------------------------------------------------------------------


@cache
def files() -> list[Path]:
    """Return the texts of the repository, without what links lead to."""
    found = [ROOT / "README.md", ROOT / "RESULTS.md"]
    for folder in FOLDERS:
        inside = sorted(
            path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".yaml")
        )
        found += [
            path for path in inside if path != Path(__file__).resolve() and path == path.resolve()
        ]
    return found


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


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


def citations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each section that is cited, and the invariants of the last one of a list.

    >>> list(citations("docs/algorithms.md 3.2 to 3.4 and 16.1, invariants 4 and 6"))
    [('3.2', []), ('3.4', []), ('16.1', ['4', '6'])]
    """
    for numbers, invariants in CITATION.findall(text):
        *others, last = re.findall(SECTION, numbers)
        yield from ((number, []) for number in others)
        yield last, re.findall(r"\d+", invariants)


def sections(text: str) -> dict[str, str]:
    """Return the bodies of a page's numbered sections, those of a chapter without its subsections."""
    parts = re.split(r"^##+ ([\d.]+) .*$", text, flags=re.MULTILINE)
    return {number.rstrip("."): body for number, body in zip(parts[1::2], parts[2::2], strict=True)}


def anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(read(path)).body if isinstance(node, ast.FunctionDef)}


@cache
def options() -> dict[str, set[str]]:
    """Return the arguments of each class of the package: those of its constructor, or the fields of a dataclass."""
    found: dict[str, set[str]] = {}
    for path in files():
        if path.suffix == ".py" and path.is_relative_to(ROOT / "lightning_mpo"):
            for node in ast.walk(ast.parse(read(path))):
                if isinstance(node, ast.ClassDef):
                    found[node.name] = {
                        inner.target.id
                        for inner in node.body
                        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
                    }
                    for inner in node.body:
                        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                            found[node.name] = {argument.arg for argument in inner.args.args[1:]}
    return found


def choices(value: Any) -> Iterator[tuple[str, set[str]]]:
    """Yield each class of a configuration with its arguments."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield value["class_path"], set(value.get("init_args", {}))
        for inner in value.values():
            yield from choices(inner)


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


# --- the page -----------------------------------------------------------------------------------------------------------


def test_the_table_of_tags_is_that_of_the_code():
    rows = re.findall(r"^\| ([A-Z]+) \| (.+) \|$", sections(read(PAGE))["1.1"], re.MULTILINE)
    assert dict(rows) == TAGS


def test_sections_are_numbered_in_order():
    numbers = [tuple(map(int, number.split("."))) for number in sections(read(PAGE))]
    assert numbers == sorted(set(numbers))
    chapters = [number for number in numbers if len(number) == 1]
    assert [number for (number,) in chapters] == list(range(1, len(chapters) + 1))


def test_every_algorithm_file_is_described():
    page = sections(read(PAGE))
    methods = "".join(body for number, body in page.items() if number.startswith("13."))
    linked = re.findall(r"\[(\w+)\]\(\.\./configs/algorithm/(\w+)\.yaml\)", methods)
    assert all(text == name for text, name in linked)
    assert sorted(name for _, name in linked) == sorted(
        p.stem for p in (ROOT / "configs" / "algorithm").glob("*.yaml")
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "algorithm").glob("*.yaml")), ids=lambda path: path.stem
)
def test_an_algorithm_file_cites_the_section_that_describes_it(path):
    page = sections(read(PAGE))
    cited = [number for number, _ in citations(read(path))]
    assert any(f"/{path.name})" in page[number] for number in cited)


def test_functions_of_the_page_exist_and_those_with_equations_are_on_it():
    named = set(re.findall(r"`functional\.(\w+)\.(\w+)`", read(PAGE)))
    known = {(path.stem, name) for path in FUNCTIONAL.glob("*.py") for name in functions(path)}
    assert named - known == set()
    assert {module for module in re.findall(r"`functional\.(\w+)`", read(PAGE))} <= {
        m for m, _ in known
    }
    public = {
        (module, name) for module, name in known if module in EQUATIONS and not name.startswith("_")
    }
    assert public - named - {("actions", "shift_left")} == set()


def test_options_of_the_page_exist():
    """Each `key: {class_path: …}` of the page names a class and arguments that it takes."""
    spans = re.findall(r"`((?:\w|\.)+: \{[^`]*\})`", read(PAGE))
    found = [choice for span in spans for choice in choices(yaml.safe_load(span))]
    assert len(found) > 15
    assert [
        (name, arguments - options()[name])
        for name, arguments in found
        if arguments - options()[name]
    ] == []


def test_classes_of_the_page_exist():
    names = set(re.findall(r"`([A-Z][a-z]+[A-Z]\w+)(?:\([^`]*\))?`", read(PAGE)))
    assert len(names) > 15
    assert names - set(options()) == set()


@pytest.mark.parametrize("module", sorted(AXES))
def test_a_file_of_an_axis_cites_its_chapter(module):
    text = (
        ast.get_docstring(ast.parse(read(ROOT / "lightning_mpo" / "objective" / f"{module}.py")))
        or ""
    )
    assert AXES[module] in [number for number, _ in citations(text)]


@pytest.mark.parametrize("module", EQUATIONS)
def test_a_file_of_equations_cites_the_page(module):
    assert list(citations(read(FUNCTIONAL / f"{module}.py")))


def test_links_of_the_page_open():
    text = read(PAGE)
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 50
    for link in links:
        target, _, place = link.partition("#")
        assert (PAGE.parent / target).exists() if target else place in anchors, link


def test_the_page_is_linked():
    for path, link in (
        ("README.md", "docs/algorithms.md"),
        ("docs/architecture.md", "algorithms.md"),
    ):
        assert f"]({link}" in read(ROOT / path), path


def test_the_table_of_equations_lists_its_files():
    rows = re.findall(
        r"^``(\w+)``",
        ast.get_docstring(ast.parse(read(FUNCTIONAL / "__init__.py"))) or "",
        re.MULTILINE,
    )
    assert sorted(rows) == sorted(
        path.stem for path in FUNCTIONAL.glob("*.py") if path.stem != "__init__"
    )
