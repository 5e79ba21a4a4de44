"""Every YAML is parsed and instantiated, and options of each are settled for a resume."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_mpo.data
from lightning_mpo.cli.save_config import SaveConfig
from lightning_mpo.cli.stages import find_list
from lightning_mpo.data.code_prompts import CodePrompts
from lightning_mpo.modules import HeadWarmup, PolicyOptimization, SupervisedWarmup
from lightning_mpo.recipes import with_includes
from lightning_mpo.resume.model_checkpoints import model_checkpoints
from lightning_mpo.resume.option_effects import effect
from lightning_mpo.resume.run_options import run_options
from tests.support.recipes import CONFIGS, name_of

FILES = sorted(CONFIGS.rglob("*.yaml"))
LISTS = [path for path in FILES if "stages" in yaml.safe_load(path.read_text())]
RUNS = [path for path in FILES if path.parent.name == "experiment" and path not in LISTS]
SECTIONS = {"model", "report", "data", "algorithm", "hardware", "experiment"}
LINES = {"experiment": 60}
"""Lines of content; experiments may be a little longer."""


def test_the_folders_are_one_per_concern():
    assert {path.parent.name for path in FILES} == SECTIONS
    assert all(path.parent.parent == CONFIGS for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_short_and_says_what_it_is(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# "), "the first line says what the file is for"
    content = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    limit = LINES.get(path.parent.name, 39)
    assert len(content) <= limit, (
        f"{len(content)} lines of content, {len(content) - limit} over the bound"
    )
    assert max(map(len, lines)) <= 140


# those of algorithms are built in test_algorithms.py
@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name not in ("experiment", "algorithm")], ids=name_of
)
def test_a_part_can_be_laid_over_a_run(build, path, monkeypatch):
    content = yaml.safe_load(path.read_text())
    touched = {
        "model": {"model"},
        "data": {"data", "rollout"},
        "hardware": {"trainer"},
        "report": {"trainer"},
    }
    quantised = path.stem.startswith(
        "qlora"
    )  # what a GPU holds is a matter of how the base is stored, too
    content.pop("include", None)
    assert set(content) <= touched[path.parent.name] | ({"model"} if quantised else set()), (
        "one choice a file"
    )
    below = ["-c", CONFIGS / "model" / "smollm2.yaml"] if quantised else []
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):  # a launcher's
        monkeypatch.setenv(name, {"MASTER_ADDR": "127.0.0.1"}.get(name, "0"))
    model, data, trainer = build("-c", "base.yaml", *below, "-c", path)
    assert isinstance(model, PolicyOptimization)
    if path.parent.name == "data":
        assert type(data).__name__ == content["data"]["class_path"]
        rollout = next(c for c in trainer.callbacks if type(c).__name__ == "RolloutLoop")
        named = [
            r if isinstance(r, str) else r["class_path"] for r in content["rollout"]["rewards"]
        ]
        assert [type(reward).__name__ for reward in rollout.rewards] == named
    if path.parent.name == "model" and "class_path" in content["model"]["init_args"]["policy"]:
        assert type(model.policy).__name__ == content["model"]["init_args"]["policy"]["class_path"]


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_an_experiment_is_whole(build, path):
    model, data, trainer = build("-c", path)
    # options of the trainer, also those of an experiment that it includes
    options: dict[str, Any] = {}
    for part in with_includes(path):
        options |= yaml.safe_load(part.read_text()).get("trainer", {})
    assert isinstance(model, PolicyOptimization | SupervisedWarmup | HeadWarmup)
    assert trainer.max_steps == options["max_steps"] > 0
    assert str(trainer.default_root_dir).startswith("runs/")
    wanted = [c if isinstance(c, str) else c["class_path"] for c in options["callbacks"]]
    built = {type(callback).__name__ for callback in trainer.callbacks}
    assert set(wanted) <= built
    assert data is not None
    command = next(
        (line for line in path.read_text().splitlines() if "lightning-mpo fit -c" in line), None
    )
    assert command is None or f"-c {path.stem}" in command


@pytest.mark.parametrize("path", LISTS, ids=name_of)
def test_stages_of_a_list_train_one_policy_and_write_into_their_folders(build, path):
    plan = find_list(["-c", str(path)])
    assert plan.folder == Path("runs") / path.stem
    policies = []
    for config in {stage.config for stage in plan.stages}:
        model, _, trainer = build("-c", config, "--trainer.default_root_dir", "runs/here")
        (saving,) = model_checkpoints(trainer)
        assert saving.save_last
        assert {Path(saving.dirpath), *(Path(log.log_dir) for log in trainer.loggers)} == {
            Path("runs/here").resolve(),
            Path("runs/here"),
        }
        names = ("lora", "source", "characters", "hidden_size", "layers", "heads", "max_length")
        policies.append([getattr(model.policy, name, None) for name in names])
    assert all(policy == policies[0] for policy in policies)


@pytest.mark.parametrize("path", sorted((CONFIGS / "data").glob("*.yaml")), ids=name_of)
def test_a_data_recipe_sets_every_text_around_a_prompt(path):
    """Laid over another recipe of data, it keeps none of the texts of that one."""
    data = yaml.safe_load(path.read_text())["data"]
    if data["class_path"] == "PromptFile":
        return  # prompts of `predict` stand between the texts of the training
    owner = getattr(lightning_mpo.data, data["class_path"])
    if issubclass(owner, CodePrompts):
        return  # code stands as it is
    signature = inspect.signature(owner).parameters
    takes_others = any(option.kind is option.VAR_KEYWORD for option in signature.values())
    for name in ("instruction", "suffix", "system"):
        if name not in signature and not takes_others:
            continue  # the class writes no text around a prompt
        assert name in data["init_args"], name
        if name in signature:  # the request that the class fixes
            assert data["init_args"][name] == signature[name].default


@pytest.mark.parametrize("path", sorted((CONFIGS / "hardware").glob("qlora_*.yaml")), ids=name_of)
def test_a_quantised_run_keeps_the_rates_of_its_experiment(build, path):
    model, _, trainer = build("-c", CONFIGS / "experiment" / "smollm2_svamp.yaml", "-c", path)
    policy = model.policy
    assert policy.quantization.bits == 4
    assert policy.lora.targets == "all-linear"
    assert policy.gradient_checkpointing
    assert policy.dtype == torch.bfloat16
    optimizer = model.optimizer([torch.nn.Parameter(torch.zeros(3))])
    assert type(optimizer).__name__ == "PagedAdamW"
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert trainer.accumulate_grad_batches > 1
    assert sum(type(callback).__name__ == "MemoryAccounting" for callback in trainer.callbacks) == 1
    size = re.search(r"\d+", path.stem)[0]
    assert f"one GPU of {size} GB" in path.read_text()


def option_paths(value: object, place: str = ""):
    """Yield the paths of a configuration as `run_options` writes them: without `init_args`, callbacks by their class."""
    if isinstance(value, dict) and "class_path" in value:
        yield place
        yield from option_paths(value.get("init_args") or {}, place)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from option_paths(inner, f"{place}.{key}" if place else key)
    elif place == "trainer.callbacks" and isinstance(value, list):
        for callback in value:
            yield from option_paths(
                callback, f"callbacks.{callback['class_path'].rsplit('.', 1)[-1]}"
            )
    else:
        yield place


@pytest.mark.parametrize(
    "name", ["quickstart", "quickstart_warmup", "quickstart_mtp_warmup", "smollm2_svamp"]
)
def test_it_is_settled_of_every_option_what_a_change_means_for_a_resume(build, monkeypatch, name):
    """An option that no rule of `EFFECTS` names fails here: say whether it moves numbers."""
    monkeypatch.chdir(CONFIGS.parent)
    _, _, trainer = build("-c", CONFIGS / "experiment" / f"{name}.yaml")
    config = next(c.config for c in trainer.callbacks if isinstance(c, SaveConfig))
    paths = list(option_paths(config.as_dict()))
    assert len(paths) > 60
    assert [path for path in paths if effect(path) is None] == []
    assert {effect(path) for path in paths} == {"refused", "reported", "compared elsewhere", "none"}


def test_every_argument_that_a_resume_compares_can_be_read(build, monkeypatch):
    """What is told or refused by its path must be among the options that are compared."""
    monkeypatch.chdir(CONFIGS.parent)
    module, data, trainer = build(
        "-c", CONFIGS / "experiment" / "quickstart.yaml", "--trainer.gradient_clip_val", 2
    )
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    found = run_options(trainer, module, data)
    config = next(c.config for c in trainer.callbacks if isinstance(c, SaveConfig))
    wanted = {
        path for path in option_paths(config.as_dict()) if effect(path) in ("refused", "reported")
    }
    unread = {path for path in wanted if not any(other.startswith(path) for other in found)}
    assert {path for path in unread if not path.startswith("trainer.")} <= {
        "data.template_arguments",
        "rollout.stop",
    }  # empty here
    assert found["trainer.gradient_clip_val"] == 2
    assert found["rollout.rewards[0]"] == "ExactAnswer"
    assert all(
        value is None or isinstance(value, str | int | float | bool) for value in found.values()
    )
