"""Names that benchmarks import from the package, also within functions, exist."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.rglob("*.py") if "studies" not in path.parts)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_names_from_the_package_exist(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
            "lightning_mpo"
        ):
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")


def test_a_measured_step_times_calls_that_exist():
    from lightning_mpo import sampling
    from lightning_mpo.callbacks import RolloutLoop
    from lightning_mpo.objective.objective import Objective
    from lightning_mpo.policies import CausalPolicy

    wrapped = [
        *((sampling.LocalSampler, "sample"), (RolloutLoop, "judge")),
        *((CausalPolicy, "score"), (Objective, "surrogate_loss")),
    ]
    source = (FOLDER / "profile_step.py").read_text()
    for owner, method in wrapped:
        assert callable(getattr(owner, method))
        assert f'{owner.__name__}, "{method}"' in source
