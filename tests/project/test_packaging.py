"""What is installed: the callbacks behind their link, the types marker, the console script."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest

import lightning_mpo
from tests.support.wheels import copied, wheel

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", ["callbacks", "configs"])
def test_a_link_is_relative_and_tracked_as_a_link(name):
    link = ROOT / "lightning_mpo" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)
    listed = subprocess.run(
        ["git", "ls-files", "-s", f"lightning_mpo/{name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
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
    (script,) = [
        entry for entry in entry_points(group="console_scripts") if entry.name == "lightning-mpo"
    ]
    assert script.load() is importlib.import_module("lightning_mpo.__main__").main
    assert (Path(sys.executable).parent / "lightning-mpo").is_file()


def test_malicious_releases_of_lightning_are_excluded():
    (wanted,) = [
        line
        for line in requires("lightning-mpo")
        if line.startswith("lightning") and "extra" not in line
    ]
    from packaging.requirements import Requirement

    allowed = Requirement(wanted).specifier
    assert "2.6.2" not in allowed
    assert "2.6.3" not in allowed
    assert "2.6.6" in allowed


def test_the_oldest_versions_are_admitted_and_as_old_as_the_bounds():
    """What `make test-oldest` installs."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    lines = subprocess.run(
        [sys.executable, ROOT / ".ci" / "oldest.py"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    wanted = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    assert [line.partition("==")[0] for line in lines] == [
        requirement.name for requirement in wanted
    ]
    for line, requirement in zip(lines, wanted, strict=True):
        bound = line.partition("==")[2].removesuffix(".*")
        assert bound in requirement.specifier, line
        (lower,) = [part.version for part in requirement.specifier if part.operator == ">="]
        assert Version(bound) == Version(lower), line


def test_every_import_is_a_dependency():
    """A package that is only there by chance is missing in the next environment."""
    import ast

    names = {
        "lightning", "torch", "transformers", "torchmetrics", "datasets", "peft", "jsonargparse", "math_verify", "gguf",
        "rich", "matplotlib", "bitsandbytes", "safetensors", "tensorboard", "filelock", "psutil", "huggingface_hub", "regex",
        "jinja2", "pyarrow",
        *("reasoning_gym", "lm_eval", "peptides"),  # extras
    }  # fmt: skip
    brought = {
        "yaml",
        "tokenizers",
        "omegaconf",
        "numpy",
        "packaging",
        "sympy",
    }  # by jsonargparse, transformers, torch, math-verify
    for path in [*(ROOT / "lightning_mpo").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {name.split(".")[0] for name in found} - {"lightning_mpo"}:
                assert top in names | brought | sys.stdlib_module_names, f"{path} imports {top}"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of the source folder, and the wheel of the source distribution."""
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    direct = wheel(copied(source), tmp_path_factory.mktemp("wheel"))
    code = (
        "from setuptools.build_meta import build_sdist; import sys; print(build_sdist(sys.argv[1]))"
    )
    folder = tmp_path_factory.mktemp("sdist")
    made = subprocess.run(
        [sys.executable, "-c", code, folder], cwd=source, capture_output=True, text=True, check=True
    )
    archive = folder / made.stdout.splitlines()[-1]
    return {"source": direct, "sdist": wheel(archive, tmp_path_factory.mktemp("again"))}


@pytest.mark.parametrize("origin", ["source", "sdist"])
def test_the_wheel_holds_the_package_its_callbacks_and_its_recipes(wheels, origin):
    with zipfile.ZipFile(wheels[origin]) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    names = set(contents)
    package = {
        path
        for pattern in ("*.py", "*.jinja")
        for path in (ROOT / "lightning_mpo").rglob(pattern)
        if "callbacks" not in path.parts
    }
    expected = {str(path.relative_to(ROOT)): path for path in package}
    manifests = (ROOT / "lightning_mpo").glob("policies/manifests/*.yaml")
    expected |= {str(path.relative_to(ROOT)): path for path in manifests}
    for folder, pattern in (("callbacks", "*.py"), ("configs", "*/*.yaml")):
        expected |= {
            f"lightning_mpo/{path.relative_to(ROOT)}": path
            for path in (ROOT / folder).glob(pattern)
        }
    for name, path in expected.items():
        assert contents[name] == path.read_bytes(), name
    information = {name for name in names if ".dist-info/" in name}
    assert names == expected.keys() | {"lightning_mpo/py.typed"} | information, (
        "and nothing else: no tests, no benchmarks"
    )
    (scripts,) = [
        contents[name].decode() for name in information if name.endswith("entry_points.txt")
    ]
    assert "lightning-mpo = lightning_mpo.__main__:main" in scripts
    (licence,) = [contents[name] for name in information if name.endswith("LICENSE")]
    assert licence == (ROOT / "LICENSE").read_bytes()
    (metadata,) = [contents[name].decode() for name in information if name.endswith("METADATA")]
    headers = metadata.partition("\n\n")[0].splitlines()
    wanted = {
        "License-Expression: Apache-2.0",
        "Description-Content-Type: text/markdown",
        "Requires-Python: >=3.11",
    }
    assert wanted <= set(headers)
    assert f"Version: {lightning_mpo.__version__}" in headers
    assert (ROOT / "README.md").read_text().strip() in metadata
