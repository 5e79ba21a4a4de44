"""Pages link to each other, and name the files, keys and random streams of a run."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from lightning_mpo.seeding import Stream
from tests.support.pages import ROOT, rows

TOP = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "RESULTS")]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
RUN_FOLDER = ROOT / "docs" / "run_folder.md"
LIGHTNINGS = ("hparams.yaml", "events.out.tfevents", "last.ckpt")
"""Files that Lightning and TensorBoard name, not this package."""


def without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_open(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if link.startswith(("http:", "https:")):
            continue
        name, _, place = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (
            place and target.suffix == ".md" and place not in anchors(target)
        ):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_of_a_page_exist(page):
    """From the root, or within the package or `configs/`."""
    paths = re.findall(r"`([\w./]+/[\w.]+\.(?:py|yaml|slurm))(?::\w+)?`", page.read_text())
    folders = (ROOT, ROOT / "lightning_mpo", ROOT / "configs")
    assert [path for path in paths if not any((near / path).is_file() for near in folders)] == []


def test_the_pages_are_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in ("CONTRIBUTING.md", "docs/from_trl.md", "docs/run_folder.md", "docs/glossary.md"):
        assert f"]({page})" in readme, page


def test_every_page_is_two_clicks_from_the_readme():
    """The README links a page, or a page that it links does."""

    def linked(page: Path) -> set[Path]:
        links = re.findall(r"\]\(([^)#\s]+\.md)", without_code(page.read_text()))
        return {(page.parent / link).resolve() for link in links if not link.startswith("http")}

    first = linked(ROOT / "README.md")
    reached = first | {page for near in first for page in linked(near)}
    assert [page.name for page in PAGES[1:] if page.resolve() not in reached] == []


def test_the_glossary_is_in_alphabetical_order():
    text = (ROOT / "docs" / "glossary.md").read_text()
    words = [
        word.strip("`").lower() for word in re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[2:]
    ]
    assert len(words) > 40
    assert words == sorted(set(words))


def test_the_random_streams_are_listed():
    table = rows(ROOT / "docs" / "architecture.md", "Random numbers")
    assert [row[0].strip("`") for row in table] == [stream.name for stream in Stream]
    for stream, row in zip(Stream, table, strict=True):
        assert [row[1], row[2]] == [*stream.value.split(": "), "none"][:2]


# --- files of a run -------------------------------------------------------------------------------------------------


@cache
def literals() -> str:
    """Return every string of the package, one a line."""
    paths = [
        path for folder in ("lightning_mpo", "callbacks") for path in (ROOT / folder).rglob("*.py")
    ]
    paths = [path for path in paths if "lightning_mpo/callbacks" not in path.as_posix()]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return "\n".join(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    )


def test_files_of_the_run_folder_are_named_in_the_code():
    named = re.findall(r"`([^`]+)`", " ".join(row[0] for row in rows(RUN_FOLDER, "Files")))
    assert len(named) > 15
    for name in named:
        if name.startswith(LIGHTNINGS):
            continue
        # placeholders stand for what a run names: `metrics_validate.csv` is f"metrics_{verb}.csv"
        parts = [
            part for part in re.split(r"<\w+>|/|_(?:validate|test)(?=\.)", name) if part.strip(".")
        ]
        assert all(part in literals() for part in parts), name


def test_keys_of_the_run_folder_are_named_in_the_code():
    text = RUN_FOLDER.read_text()
    keys = {
        row[0] for heading in ("summary.json", "memory.json") for row in rows(RUN_FOLDER, heading)
    }
    names = {name for key in keys for name in re.findall(r"`([^`<]+?)_?(?=[`<])", key)}
    fragments = {"pass_at_1": "pass_at_", "greedy_accuracy": "greedy_"}
    assert {"peak_rss_mb", "baseline", "undecided"} <= names
    fields_of = {
        "weights",
        "support",
        "gradients",
        "optimiser",
    }  # put together from names of fields, or as a prefix
    assert [n for n in names - fields_of if fragments.get(n, n) not in literals()] == []
    for name in ("rollouts.jsonl", "predictions.jsonl", "manifest.json", "meta.pt", "events.json"):
        assert f"`{name}`" in text
        assert name in literals()
