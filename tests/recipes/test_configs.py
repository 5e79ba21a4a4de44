"""Every YAML is parsed and instantiated; an algorithm file sets every axis and every argument."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lightning_mpo import cli, recipes
from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.cli.messages import _classes
from lightning_mpo.cli.save_config import SaveConfig
from lightning_mpo.errors import UserError
from lightning_mpo.modules import HeadWarmup, PolicyOptimization, SupervisedWarmup
from lightning_mpo.objective.objective import Objective
from lightning_mpo.resume.run_options import effect, run_options
from tests.support.configurations import BASE

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
ALGORITHMS = sorted((CONFIGS / "algorithm").glob("*.yaml"))
SECTIONS = {"model", "report", "data", "algorithm", "hardware", "experiment"}
LINES = {"experiment": 60}
"""Lines of content; experiments may be a little longer."""


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Instantiate what a configuration names, without training."""
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    built: list[tuple] = []
    warmed: list[str] = []

    @functools.wraps(L.Trainer.fit)
    def fit(self, model, train_dataloaders=None, val_dataloaders=None, datamodule=None, **kwargs):
        built.append((model, datamodule, self))

    monkeypatch.setattr(L.Trainer, "fit", fit)
    monkeypatch.setattr(
        "lightning_mpo.cli.parser.fit_first", lambda config, checkpoint, seed: warmed.append(config)
    )

    def run(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["lightning-mpo", "fit", *map(str, arguments)])
        assert cli.run() == 0
        assert all(recipes.find(config).is_file() for config in warmed)
        return built[-1]

    return run


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


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "experiment"], ids=name_of)
def test_a_part_can_be_laid_over_a_run(build, path, monkeypatch):
    content = yaml.safe_load(path.read_text())
    touched = {
        "model": {"model"},
        "algorithm": {"model", "rollout"},
        "data": {"data", "rollout"},
        "hardware": {"trainer"},
        "report": {"trainer"},
    }
    quantised = path.stem.startswith(
        "qlora"
    )  # what a GPU holds is a matter of how the base is stored, too
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


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "experiment"], ids=name_of)
def test_an_experiment_is_whole(build, path):
    model, data, trainer = build("-c", path)
    content = yaml.safe_load(path.read_text())
    assert isinstance(model, PolicyOptimization | SupervisedWarmup | HeadWarmup)
    assert trainer.max_steps == content["trainer"]["max_steps"] > 0
    assert str(trainer.default_root_dir).startswith("runs/")
    wanted = [c if isinstance(c, str) else c["class_path"] for c in content["trainer"]["callbacks"]]
    built = {type(callback).__name__ for callback in trainer.callbacks}
    assert set(wanted) <= built
    assert data is not None
    command = next(
        (line for line in path.read_text().splitlines() if "lightning-mpo fit -c" in line), None
    )
    assert command is None or f"-c {path.stem}" in command


@pytest.mark.parametrize("path", ALGORITHMS, ids=name_of)
def test_an_algorithm_sets_every_axis_and_every_argument(path):
    """Files overlay key by key: what one does not set stays as the file before left it."""
    content = yaml.safe_load(path.read_text())
    assert content["model"]["class_path"] == "PolicyOptimization"
    objective = content["model"]["init_args"]["objective"]
    assert set(objective) == {item.name for item in fields(Objective)}
    assert_complete(objective, str(path))
    assert set(content["rollout"]) == {"dynamic", "mask_truncated"}, (
        "what an algorithm asks of rollouts, and nothing else"
    )
    assert_complete(content["rollout"], str(path))


@pytest.mark.parametrize("path", ALGORITHMS, ids=name_of)
def test_an_algorithm_leaves_no_dynamic_sampling_of_the_one_before(build, path):
    content = yaml.safe_load(path.read_text())["rollout"]
    other = {
        "dynamic": {"class_path": "DynamicSampling", "init_args": {"rounds": 7}},
        "mask_truncated": True,
    }
    Path("before.yaml").write_text(yaml.safe_dump({"rollout": other}))
    _, _, trainer = build("-c", "base.yaml", "-c", "before.yaml", "-c", path)
    rollout = next(c for c in trainer.callbacks if isinstance(c, RolloutLoop))
    assert (rollout.dynamic and rollout.dynamic.rounds) == (10 if "dapo" in path.stem else None)
    assert rollout.mask_truncated is content["mask_truncated"] is False


def test_the_overlong_penalty_is_added_as_dapo_says(build):
    """By the option that its file names, and with a limit that is read from the rollout."""
    path = CONFIGS / "algorithm" / "dapo.yaml"
    option = re.search(r"--rollout\.rewards\+='(.+)'", path.read_text())
    assert option is not None
    reward = {
        "class_path": "OverlongPenalty",
        "init_args": {"limit": "${rollout.max_new_tokens}", "buffer": 3},
    }
    Path("penalty.yaml").write_text(
        yaml.safe_dump({"rollout": {"rewards": ["ExactAnswer", reward]}})
    )
    for more, limit, buffer in (
        (["-c", "penalty.yaml"], 6, 3),
        ([f"--rollout.rewards+={option[1]}"], 40, 8),
    ):
        _, _, trainer = build("-c", "base.yaml", "-c", path, *more)
        rewards = next(c for c in trainer.callbacks if isinstance(c, RolloutLoop)).rewards
        assert [type(part).__name__ for part in rewards] == ["ExactAnswer", "OverlongPenalty"]
        assert (rewards[1].limit, rewards[1].buffer) == (limit, buffer)


def assert_complete(value: object, where: str) -> None:
    """Check each class in a tree of options against its signature."""
    if isinstance(value, dict) and "class_path" in value:
        given = set(value.get("init_args", {}))
        takes = set(inspect.signature(_classes()[value["class_path"]].__init__).parameters) - {
            "self"
        }
        assert given == takes, f"{where}: {value['class_path']} leaves {takes - given} open"
        assert_complete(value.get("init_args", {}), where)
    elif isinstance(value, dict):
        for key, inner in value.items():
            assert_complete(inner, f"{where}.{key}")
    elif isinstance(value, str) and value in _classes():
        takes = set(inspect.signature(_classes()[value].__init__).parameters) - {"self"}
        own = _classes()[value].__init__ is not object.__init__
        assert not (takes and own), f"{where}: {value} takes {takes}; write them out"


@pytest.mark.parametrize("path", ALGORITHMS, ids=name_of)
def test_an_algorithm_is_the_one_it_says(build, path):
    model, _, _ = build("-c", "base.yaml", "-c", path)
    said = model.objective.describe()
    named = {
        "grpo": [
            "TokenActions",
            "SequenceMean",
            "scale=std",
            "low=0.2, high=0.2",
            "FullVocabulary",
            "kl none",
        ],
        "dapo": ["TokenActions", "TokenMean", "low=0.2, high=0.28"],
        "dr_grpo": ["TokenActions", "ConstantLength(length=6)", "scale=none"],
        "gspo": [
            "SequenceActions(mean=True, form=sequence)",
            "SequenceMean",
            "low=0.0003, high=0.0004",
        ],
        "gspo_token": [
            "SequenceActions(mean=True, form=token)",
            "SequenceMean",
            "low=0.0003, high=0.0004",
        ],
        "rloo": [
            "SequenceActions(mean=False, form=sequence)",
            "LeaveOneOut",
            "SequenceMean",
            "estimator=k1, place=reward",
            "0.05",
        ],
        "reinforce": ["ReturnToGo(gamma=1, whiten=False)", "PolicyGradient", "kl none"],
        "reinforce_plus_plus": [
            "ReturnToGo(gamma=1, whiten=True)",
            "ClippedRatio",
            "estimator=k1, place=reward",
            "0.01",
        ],
        "reinforce_plus_plus_baseline": ["GroupRelative(scale=batch)", "TokenMean", "kl none"],
        "cispo": ["TokenActions", "TokenMean", "ClippedWeight(low=1, high=4)"],
        "aspo": [
            "TokenActions",
            "TokenMean",
            "AsymmetricRatio(low=0.2, high=0.2, wide=None, cap_positive=3, cap_negative=3)",
        ],
        "gmpo": [
            "SequenceActions(mean=True, form=sequence)",
            "BoundedTokens(low=0.4, high=0.4)",
            "SequenceMean",
        ],
        "dppo": [
            "scale=none",
            "DivergenceMask(delta=0.15, delta_up=None, divergence=tv, cap=5, top_k=None)",
        ],
        "dppo_kl": [
            "scale=none",
            "DivergenceMask(delta=0.05, delta_up=None, divergence=kl, cap=5, top_k=None)",
        ],
        "s_grpo": [
            "PolicyGradient",
            "SampledTokens(prefix=50, cap=100, probability=0.4, cap_mode=scan",
            "SequenceMean",
        ],
        "t_spmo": [
            "PrefixTree(count=False)",
            "PolicyGradient",
            "TokenMean",
            "penalty WeightPenalty(coef=0.01)",
        ],
        "grpo_high_entropy": ["HighEntropyTokens(share=0.2)", "ClippedRatio(low=0.2, high=0.2"],
        "rlpt": ["TopK(k=16, from_reference=False, outside=refuse)", "TokenActions"],
        "mpo_segments": [
            "SegmentActions(segmenter=DelimiterSegmenter(",
            "ratio=mean",
            "SequenceMean",
            "FullVocabulary",
        ],
        "mpo_backbone": ["BlockActions(length=3", "0.8", "FullVocabulary"],
        "mpo": ["BlockActions(length=3", "source=mtp", "HeadUpkeep(coef=0.1)", "SequenceMean"],
        "mpo_dapo": ["source=mtp", "TokenMean", "low=0.2, high=0.28"],
        "mpo_rlpt": ["source=mtp", "TopK(k=16, from_reference=False, outside=refuse)"],
        "mpo_backbone_rlpt": [
            "BlockActions(length=3",
            "TopK(k=16, from_reference=False, outside=refuse)",
        ],
        "ppo": [
            "TokenActions",
            "GeneralizedAdvantage(gamma=1, lam=0.95, whiten=True)",
            "ClippedRatio(low=0.2, high=0.2",
            "TokenMean",
            "critic ValueLoss(coef=0.1, clip=0.2)",
        ],
        "mpo_ppo": [
            "source=mtp",
            "GeneralizedAdvantage",
            "HeadUpkeep(coef=0.1)",
            "ValueLoss(coef=0.1, clip=0.2)",
        ],
    }
    for part in named.get(path.stem, []):
        assert part in said


@pytest.mark.parametrize("path", ALGORITHMS, ids=name_of)
def test_an_algorithm_names_the_overlays_without_which_it_is_refused(build, path):
    overlays = re.findall(r"-c (\w+)", path.read_text())
    assert all(recipes.find(overlay).parent.name == "model" for overlay in overlays)
    for count in range(len(overlays) + 1):
        model, _, _ = build(
            "-c", "base.yaml", "-c", path, *sum((["-c", o] for o in overlays[:count]), [])
        )
        with (
            contextlib.nullcontext()
            if count == len(overlays)
            else pytest.raises(UserError, match="needs? ")
        ):
            model.policy.check(model.objective.request)


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
        "data.template_arguments"
    }  # empty here
    assert found["trainer.gradient_clip_val"] == 2
    assert found["rollout.rewards[0]"] == "ExactAnswer"
    assert all(
        value is None or isinstance(value, str | int | float | bool) for value in found.values()
    )
