"""What is installed: the callbacks behind their link, the types marker, the console script."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest

import lightning_mpo

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_link_is_relative_and_tracked_as_a_link():
    link = ROOT / "lightning_mpo" / "callbacks"
    assert link.is_symlink()
    assert link.readlink() == Path("../callbacks")
    listed = subprocess.run(
        ["git", "ls-files", "-s", "lightning_mpo/callbacks"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout.startswith("120000 ")


def test_a_second_set_of_classes_is_refused():
    """From the repository's root `import callbacks` finds the folder; its classes would not be ours."""
    spec = importlib.util.spec_from_file_location("callbacks", ROOT / "callbacks" / "__init__.py")
    with pytest.raises(ImportError, match="import `lightning_mpo.callbacks`, not `callbacks`"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_every_callback_file_is_exported():
    from lightning_mpo import callbacks

    modules = {getattr(callbacks, name).__module__ for name in callbacks.__all__}
    files = {f"lightning_mpo.callbacks.{path.stem}" for path in (ROOT / "callbacks").glob("*.py")}
    assert files - {"lightning_mpo.callbacks.__init__"} <= modules


def test_the_version_stands_once():
    assert PROJECT["project"]["version"] == lightning_mpo.__version__ == version("lightning-mpo")


def test_the_console_script_is_main():
    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "lightning-mpo"]
    assert script.load() is importlib.import_module("lightning_mpo.__main__").main
    assert (Path(sys.executable).parent / "lightning-mpo").is_file()


def test_malicious_releases_of_lightning_are_excluded():
    (wanted,) = [line for line in requires("lightning-mpo") if line.startswith("lightning") and "extra" not in line]
    from packaging.requirements import Requirement

    allowed = Requirement(wanted).specifier
    assert "2.6.2" not in allowed
    assert "2.6.3" not in allowed
    assert "2.6.6" in allowed


def test_every_import_is_a_dependency():
    """A package that is only there by chance is missing in the next environment."""
    import ast

    names = {
        "lightning", "torch", "transformers", "torchmetrics", "datasets", "peft", "jsonargparse", "math_verify", "gguf",
        "rich", "matplotlib", "bitsandbytes", "safetensors", "tensorboard",
    }  # fmt: skip
    brought = {
        "yaml",
        "tokenizers",
        "omegaconf",
        "huggingface_hub",
        "numpy",
        "packaging",
    }  # by jsonargparse, transformers, torch
    for path in [*(ROOT / "lightning_mpo").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {name.split(".")[0] for name in found} - {"lightning_mpo"}:
                assert top in names | brought | sys.stdlib_module_names, f"{path} imports {top}"


def test_the_wheel_holds_the_package_and_its_callbacks(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    (source / "README.md").touch()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("lightning_mpo", "callbacks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    expected = {f"lightning_mpo/callbacks/{path.name}" for path in (ROOT / "callbacks").glob("*.py")}
    expected |= {str(p.relative_to(ROOT)) for p in (ROOT / "lightning_mpo").rglob("*.py") if "callbacks" not in p.parts}
    assert expected <= names
    assert "lightning_mpo/py.typed" in names
    assert not [name for name in names if name.startswith(("callbacks/", "tests/", "configs/"))]
    assert "lightning-mpo = lightning_mpo.__main__:main" in scripts
