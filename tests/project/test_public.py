"""The package from Python: its public names, objectives from files, and runs from arguments."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_mpo
from lightning_mpo import Objective, UserError, recipes
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.recipes import headers
from tests.support.heavy import HEAVY

PACKAGE = Path(lightning_mpo.__file__).parent
ALGORITHMS = sorted(path.stem for path in (PACKAGE / "configs" / "algorithm").glob("*.yaml"))


def for_type_checkers() -> dict[str, str]:
    """Return the names that `if TYPE_CHECKING:` imports, by their modules."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_and_python_see_the_same_names():
    assert for_type_checkers() == {
        name: f"lightning_mpo.{home}" for name, home in lightning_mpo._HOME.items()
    }
    assert lightning_mpo.__all__ == sorted([*lightning_mpo._HOME, "__version__"])
    assert set(lightning_mpo.__all__) <= set(dir(lightning_mpo))


@pytest.mark.parametrize("name", sorted(lightning_mpo._HOME))
def test_a_public_name_is_the_class_of_its_module(name):
    home = importlib.import_module(f"lightning_mpo.{lightning_mpo._HOME[name]}")
    assert getattr(lightning_mpo, name) is getattr(home, name)
    assert (getattr(lightning_mpo, name).__doc__ or "").strip(), "what is public says what it is"


def test_names_that_are_none_are_refused_as_of_any_module():
    with pytest.raises(AttributeError, match="module 'lightning_mpo' has no attribute 'Objectiv'"):
        lightning_mpo.Objectiv  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Objectiv'"):
        from lightning_mpo import Objectiv  # noqa: F401
    assert not hasattr(lightning_mpo, "_something")


def test_looking_at_the_package_imports_nothing_heavy(tmp_path):
    code = (
        f"import sys, lightning_mpo; dir(lightning_mpo); lightning_mpo.__all__; hasattr(lightning_mpo, 'x'); \
lightning_mpo.UserError; print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- objectives from files ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*also sets `rollout.dynamic`")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_the_one_that_the_command_line_builds(name):
    """Compared class by class and argument by argument with what the file says."""
    made = Objective.from_file(name, max_new_tokens=40)
    written = headers.read(recipes.find(name)).choices
    terms = written.pop("terms")
    assert len(terms) == len(made.terms)
    pairs = [(getattr(made, axis), choice) for axis, choice in written.items()]
    for part, choice in (*pairs, *zip(made.terms, terms, strict=True)):
        if choice is None:
            assert part is None
        elif isinstance(choice, dict) and "class_path" in choice:
            assert type(part).__name__ == choice["class_path"]
            for key, value in (choice.get("init_args") or {}).items():
                if isinstance(value, int | float) and hasattr(part, key):
                    assert getattr(part, key) == value, f"{part}.{key}"
        elif isinstance(choice, str):
            assert type(part).__name__ == choice
    assert Objective.from_file(recipes.find(name), max_new_tokens=40).describe() == made.describe()


def test_later_files_overlay_earlier_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("narrow.yaml").write_text(
        "model: {init_args: {objective: {surrogate: {init_args: {low: 0.1}}}}}"
    )
    made = Objective.from_file("grpo", "narrow.yaml")
    assert isinstance(made.surrogate, ClippedRatio)
    assert (made.surrogate.low, made.surrogate.high) == (0.1, 0.2)
    Path("mine.yaml").write_text("include: [grpo, narrow.yaml]\ntrainer: {max_steps: 3}")
    assert Objective.from_file("mine.yaml").describe() == made.describe()
    assert Objective.from_file(Path("mine.yaml")).describe() == made.describe()


def test_a_length_comes_from_the_argument_or_the_files(tmp_path):
    assert Objective.from_file("dr_grpo", max_new_tokens=24).reduction.length == 24
    more = tmp_path / "more.yaml"
    more.write_text("rollout: {max_new_tokens: 12}")
    assert Objective.from_file("dr_grpo", more).reduction.length == 12
    assert Objective.from_file("dr_grpo", more, max_new_tokens=7).reduction.length == 7
    assert Objective.from_file("quickstart", "dr_grpo").reduction.length == 40
    with pytest.raises(UserError, match=r"dr_grpo: .* longest response: give `max_new_tokens`"):
        Objective.from_file("dr_grpo")


def test_a_run_that_draws_prompts_its_own_way_says_so():
    message = r"dapo also sets `rollout.dynamic` to `DynamicSampling`, .*: give it to `RolloutLoop\(dynamic=…\)`"
    with pytest.warns(UserWarning, match=message):
        Objective.from_file("dapo")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["grop"], "no configuration file or recipe 'grop'; did you mean `grpo`?"),
        ([], '`Objective.from_file` needs a recipe or a file, such as "grpo"'),
        (
            ["tiny"],
            "tiny sets no `model.init_args.objective`; `lightning-mpo configs` lists the algorithms",
        ),
        (
            ["grpo", "typo.yaml"],
            "grpo, typo.yaml: `objective.surrogate`: `ClippedRatio` has no argument `lo`",
        ),
        (["grpo", "axis.yaml"], "grpo, axis.yaml: "),
        (["grpo", "class.yaml"], "did you mean `ClippedRatio`?"),
        (["grpo", "value.yaml"], "grpo, value.yaml: "),
        (["grpo", "text.yaml"], "grpo, text.yaml: "),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, names, wanted):
    monkeypatch.chdir(tmp_path)
    objectives = {
        "typo": {"surrogate": {"init_args": {"lo": 0.1}}},
        "axis": {"surogate": "ClippedRatio"},
        "class": {"surrogate": "ClipedRatio"},
        "value": {"surrogate": {"init_args": {"low": -1.0}}},
        "text": {"surrogate": {"init_args": {"low": "much"}}},
    }
    for name, objective in objectives.items():
        Path(f"{name}.yaml").write_text(
            yaml.safe_dump({"model": {"init_args": {"objective": objective}}})
        )
    with pytest.raises(UserError) as refused:
        Objective.from_file(*names)
    assert wanted in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 450


# --- Lightning's own ways -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PolicyOptimization", "SupervisedWarmup", "HeadWarmup"])
def test_loading_a_module_from_a_checkpoint_says_how_weights_are_loaded(name):
    module = getattr(lightning_mpo, name)
    for arguments in ((), ("last.ckpt",)):
        with pytest.raises(
            UserError, match=f"`{name}.load_from_checkpoint` cannot build the policy, .*`ckpt_path="
        ):
            module.load_from_checkpoint(*arguments)
