"""docs/metrics.md lists every metric that the code logs, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUPS = (
    *(
        "loss",
        "policy",
        "optim",
        "ratio",
        "trust",
        "pairs",
        "correction",
        "kl",
        "likelihood",
        "heads",
        "mtp",
        "value",
        "reward",
        "rollout",
    ),
    *("support", "val", "throughput", "time", "memory", "parity"),
)
NAME = re.compile(rf"({'|'.join(GROUPS)})/[a-z0-9_{{}}]+")
INNER = {"value/return_square", "val/support", "val/{}{}", "val/{}", "val/support_{}"}
"""Sums that become another metric, and names that are put together; the page lists what they come to."""


def logged() -> set[str]:
    """Return the names in string literals of the package; a part in braces is empty."""
    names: set[str] = set()
    for folder in ("lightning_mpo", "callbacks"):
        for path in (ROOT / folder).rglob("*.py"):
            if any(parent.is_symlink() for parent in path.parents):
                continue
            tree = ast.parse(path.read_text())
            parts = {
                id(v)
                for node in ast.walk(tree)
                if isinstance(node, ast.JoinedStr)
                for v in node.values
            }
            for node in ast.walk(tree):
                text = None
                if (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and id(node) not in parts
                ):
                    text = node.value
                elif isinstance(node, ast.JoinedStr):
                    text = "".join(
                        str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values
                    )
                if text is not None and NAME.fullmatch(text):
                    names.add(text)
    return names - INNER


def listed() -> set[str]:
    """Return the names in the first column of the tables."""
    names: set[str] = set()
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if line.startswith("| `"):
            names |= set(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return names


def plain(name: str) -> str:
    return re.sub(r"\{\w*\}", "{}", name)


def test_every_logged_metric_is_on_the_page():
    page = {plain(name) for name in listed()}
    assert len(logged()) > 50
    assert sorted(name for name in logged() if name not in page and not covered(name, page)) == []


def covered(name: str, page: set[str]) -> bool:
    """Return whether a name with a fixed part stands for a general one, such as `reward/mean` for `reward/{}`."""
    return name.startswith("val/") and f"val/{name.rpartition('/')[2]}" in page


def test_every_metric_of_the_page_is_logged():
    names = ("reward", "judged", "answered", "length", "truncated", "pass_at_1_gain")
    accuracies = ("pass_at_{}", "maj_at_{}", "pass_at_{}_low", "pass_at_{}_high")
    evaluated = {f"val/{name}" for name in (*names, *accuracies)}
    made = logged() | evaluated | {"loss", "cross_entropy_{}"}
    assert sorted(name for name in listed() if plain(name) not in made) == []


@pytest.mark.parametrize("name", sorted(logged()))
def test_a_name_is_in_snake_case(name):
    assert re.fullmatch(r"[a-z]+/[a-z0-9_{}]+", name)
