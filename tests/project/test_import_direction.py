"""Who may import whom, and what importing the package costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.heavy import HEAVY

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_mpo"
PAGE = ROOT / "docs" / "architecture.md"
LEVEL = {
    room: int(level)
    for level, room in re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
}
"""Layer of each file or folder of the package, as the page lists them."""
LAZY = {("objective.objective", "cli.objective_files")}
"""Imports from above, within a function and by name: a convenience of the class for use from Python."""


def modules() -> list[Path]:
    """Return every module of the package; `callbacks` through its link."""
    linked = [PACKAGE / "callbacks" / path.name for path in (ROOT / "callbacks").glob("*.py")]
    files = [path for path in PACKAGE.rglob("*.py") if "callbacks" not in path.parts]
    return sorted({path for path in [*files, *linked] if path != PACKAGE / "__init__.py"})


def room(name: str) -> str:
    """Return the part of a dotted name behind the package's."""
    return name.split(".")[1] if "." in name else "lightning_mpo"


def name_of(path: Path) -> str:
    return ".".join(
        ("lightning_mpo", *path.relative_to(PACKAGE).with_suffix("").parts)
    ).removesuffix(".__init__")


def imports(tree: ast.AST) -> set[str]:
    """Return dotted names of everything imported anywhere: at the top, within functions, for types, by name."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {value.value for value in node.args if isinstance(value, ast.Constant)}
    return names


def imports_of(path: Path) -> set[str]:
    return imports(ast.parse(path.read_text()))


def test_the_page_lists_every_room_once():
    rooms = {room(name_of(path)) for path in modules()}
    assert rooms == set(LEVEL), "the table in docs/architecture.md lists other rooms"
    assert "lightning_mpo.policies.base.Policy" in imports_of(PACKAGE / "policies" / "described.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: name_of(path))
def test_imports_point_down_or_sideways(path):
    """Imports for types and within functions count."""
    module = name_of(path).removeprefix("lightning_mpo.")
    for name in imports_of(path):
        assert name.split(".")[0] != "callbacks", "import `lightning_mpo.callbacks`"
        if name.startswith("lightning_mpo.") and room(name) in LEVEL:
            allowed = LEVEL[room(name)] <= LEVEL[room(name_of(path))]
            assert allowed or (module, name.removeprefix("lightning_mpo.")) in LAZY, (
                f"{module} imports {name}, a layer above"
            )


def test_an_import_for_types_or_within_a_function_is_seen():
    code = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from lightning_mpo.cli.parser import CLI
def late():
    import lightning_mpo.modules
    importlib.import_module("lightning_mpo.plan")
"""
    assert {name for name in imports(ast.parse(code)) if name.startswith("lightning_mpo")} == {
        "lightning_mpo.cli.parser.CLI",
        "lightning_mpo.modules",
        "lightning_mpo.plan",
    }


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "functional").glob("*.py")), ids=lambda path: path.stem
)
def test_functional_imports_torch_itself_and_the_standard_library(path):
    for name in imports_of(path):
        top = name.split(".")[0]
        assert (
            top in sys.stdlib_module_names
            or top == "torch"
            or name.startswith("lightning_mpo.functional")
        ), name


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    code = f"import sys, lightning_mpo, lightning_mpo.__main__; print([m for m in {HEAVY} if m in sys.modules])"
    done = python(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_callbacks_are_one_set_of_classes_behind_a_link():
    link = PACKAGE / "callbacks"
    assert link.is_symlink(), (
        "a clone without symbolic links has no callbacks: `git config core.symlinks true`"
    )
    assert link.readlink() == Path("../callbacks")
    code = """
import lightning_mpo.callbacks
assert lightning_mpo.callbacks.RolloutLoop.__module__ == "lightning_mpo.callbacks.rollout"
try:
    import callbacks
except ImportError as error:
    print(error)
"""
    done = python(code, ROOT)
    assert done.stdout.strip() == "import `lightning_mpo.callbacks`, not `callbacks`", (
        done.stdout + done.stderr
    )
