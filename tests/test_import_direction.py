"""Who may import whom, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_mpo"
LAYERS = [
    ["errors", "checks", "hyperparameters", "quiet", "yaml_files", "types", "seeding", "resident", "optimizers"],
    ["headers", "recipes", "storage"],
    ["functional"],
    ["segmenters"],
    [
        "supports",
        "action_spaces",
        "advantages",
        "surrogates",
        "selection",
        "reductions",
        "kl",
        "value_loss",
        "corrections",
        "terms",
        "scores",
        "loss_metrics",
        "rewards",
        "metrics",
    ],
    ["axes"],
    ["objective", "composition", "policies"],
    ["rollout", "data"],
    ["modules"],
    ["export"],
    ["callbacks"],
    [
        "cli",
        "messages",
        "objective_files",
        "methods",
        "recipes_command",
        "other_names",
        "mistakes",
        "plan",
        "export_command",
        "predict_command",
        "verify_resume",
        "__main__",
    ],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
HEAVY = ("torch", "lightning", "transformers", "peft", "datasets", "matplotlib")


def modules() -> list[Path]:
    """Return every module of the package; `callbacks` through its link."""
    linked = [PACKAGE / "callbacks" / path.name for path in (ROOT / "callbacks").glob("*.py")]
    files = [path for path in PACKAGE.rglob("*.py") if "callbacks" not in path.parts]
    return sorted({path for path in [*files, *linked] if path != PACKAGE / "__init__.py"})


def room(name: str) -> str:
    """Return the part of a dotted name behind the package's."""
    return name.split(".")[1] if "." in name else "lightning_mpo"


def name_of(path: Path) -> str:
    return ".".join(("lightning_mpo", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports(tree: ast.AST) -> set[str]:
    """Return dotted names of everything imported anywhere, `if TYPE_CHECKING` left out."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                found |= imports(other)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = node.module == "lightning_mpo"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {str(node.module)}
        else:
            found |= imports(node)
    return found


def imports_of(path: Path) -> set[str]:
    return imports(ast.parse(path.read_text()))


def test_the_walk_sees_the_package():
    rooms = {room(name_of(path)) for path in modules()}
    assert rooms <= set(LEVEL), f"give these a layer: {rooms - set(LEVEL)}"
    assert {"functional", "objective", "policies", "rollout", "modules", "callbacks", "cli"} <= rooms
    assert "lightning_mpo.policies.base" in imports_of(PACKAGE / "policies" / "causal.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: name_of(path))
def test_imports_point_down_or_sideways(path):
    own = LEVEL[room(name_of(path))]
    for name in imports_of(path):
        assert name.split(".")[0] != "callbacks", "import `lightning_mpo.callbacks`"
        if name.split(".")[0] == "lightning_mpo" and name != "lightning_mpo":
            assert LEVEL[room(name)] <= own, f"{name_of(path)} imports {name} from a layer above"


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").glob("*.py")), ids=lambda path: path.stem)
def test_functional_imports_torch_itself_and_the_standard_library(path):
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top in sys.stdlib_module_names or top == "torch" or name.startswith("lightning_mpo.functional"), name


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    code = f"import sys, lightning_mpo, lightning_mpo.__main__; print([m for m in {HEAVY} if m in sys.modules])"
    done = python(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_callbacks_are_one_set_of_classes_behind_a_link():
    link = PACKAGE / "callbacks"
    assert link.is_symlink(), "a clone without symbolic links has no callbacks: `git config core.symlinks true`"
    assert link.readlink() == Path("../callbacks")
    code = """
import lightning_mpo.callbacks
assert lightning_mpo.callbacks.Rollout.__module__ == "lightning_mpo.callbacks.rollout"
try:
    import callbacks
except ImportError as error:
    print(error)
"""
    done = python(code, ROOT)
    assert done.stdout.strip() == "import `lightning_mpo.callbacks`, not `callbacks`", done.stdout + done.stderr
