"""docs/algorithms.md describes every algorithm file, function and option, and each of them cites it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mpo.recipes.headers import TAGS
from tests.support.citations import PAGE, ROOT, citations, files, read, sections

FUNCTIONAL = ROOT / "lightning_mpo" / "functional"
EQUATIONS = [
    "actions",
    "advantages",
    "block_weights",
    "corrections",
    "diagnostics",
    "divergences",
    "future_credit",
    "groups",
    "head_diagnostics",
    "heads",
    "lengths",
    "linear_bound",
    "noise",
    "prefix_tree",
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
    "likelihoods": "17",
    "one_pass": "17.5",
    "corrections": "9",
    "value_loss": "10",
    "terms": "12",
}
"""Files of axes, and the chapter of each."""


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
