"""The measure of structure: its counts on small files, and circles of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
assert specification is not None
assert specification.loader is not None
house = importlib.util.module_from_spec(specification)
sys.modules["house"] = house  # dataclasses look their module up
specification.loader.exec_module(house)


def checkout(folder: Path, **files: str) -> Path:
    """Write files of a package, by name."""
    (folder / "lightning_mpo").mkdir()
    (folder / "callbacks").mkdir()
    for name, text in files.items():
        (folder / "lightning_mpo" / f"{name}.py").write_text(text)
    return folder


def test_no_file_imports_itself_through_others():
    """Imports under TYPE_CHECKING and within functions count."""
    assert house.measure(ROOT).places["circles of files"] == []


def test_a_circle_through_type_checking_and_a_function_is_seen(tmp_path):
    first = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lightning_mpo.second import B\n"
    second = "def late():\n    import lightning_mpo.third\n"
    third = "from lightning_mpo import first\n"
    figures = house.measure(
        checkout(tmp_path, first=first, second=second, third=third, alone="import torch\n")
    )
    (circle,) = figures.places["circles of files"]
    assert circle == "lightning_mpo/first.py - lightning_mpo/second.py - lightning_mpo/third.py"


def test_sizes_comments_and_wide_lines(tmp_path):
    lines = [f"    x{i} = {i}" for i in range(25)]
    text = (
        "def many(a, b, c, d, e, f, g, h, i):\n"
        + '    """Say it."""\n'
        + "\n".join(lines)
        + "  # why\n"
    )
    text += (
        "    # noqa: F841\n    return None\n\n\n"
        + f"WIDE = '{'x' * 100}'\n"
        + f'"""{"y" * 120}"""\n'
    )
    text += "a = b  # type: ignore\n"
    values = house.measure(checkout(tmp_path, wide=text)).values
    assert values["functions with more than 8 arguments"] == 1
    assert values["functions over 60 lines"] == 0
    assert values["code lines over 100 columns"] == 1, "strings that stand alone are documentation"
    assert values["type: ignore"] == 1
    assert values["comments per 100 code lines, in bodies over 20 lines"] == round(100 / 27, 1)


def test_a_long_file_is_named(tmp_path):
    figures = house.measure(checkout(tmp_path, long="x = 1\n" * 301, short="x = 1\n" * 300))
    assert figures.places["files over 300 lines"] == ["lightning_mpo/long.py (301)"]


def test_the_package_is_within_its_bounds():
    values = house.measure(ROOT).values
    beyond = {name: values[name] for name, most in house.BOUNDS.items() if values[name] > most}
    below = {name: values[name] for name, least in house.LEAST.items() if values[name] < least}
    assert (beyond, below) == ({}, {})
