"""Configuration files: overlays, includes, interpolation, and what loggers get of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mpo import recipes
from lightning_mpo.callbacks import Watchdog
from lightning_mpo.cli.plan_objects import build
from tests.support.commands import write
from tests.support.configurations import BASE

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "experiment" / "quickstart.yaml"
ALGORITHMS = sorted((ROOT / "configs" / "algorithm").glob("*.yaml"))


@pytest.fixture
def parsed(call, capsys):
    """Return the configuration that arguments give."""

    def parse(*arguments: object, verb: str = "fit") -> dict:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(verb, *arguments, "--print_config")
        assert not stop.value.code
        return without_empty(yaml.safe_load(capsys.readouterr().out))

    return parse


def without_empty(value: Any) -> Any:
    """Leave out `init_args: {}`, which the parser writes for some classes without options."""
    if isinstance(value, list):
        return [without_empty(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: without_empty(v) for k, v in value.items() if (k, v) != ("init_args", {})}


# --- configuration files ------------------------------------------------------------------------------------------------


def test_files_overlay_key_by_key_and_the_command_line_wins(here, parsed):
    write(
        here / "one.yaml",
        {"rollout": {"prompts": 6, "completions": 5}, "trainer": {"max_steps": 7}},
    )
    write(
        here / "two.yaml",
        {"rollout": {"completions": 3}, "model": {"init_args": {"temperature": 0.7}}},
    )
    config = parsed("-c", "base.yaml", "-c", "one.yaml", "-c", "two.yaml", "--trainer.max_steps", 9)
    assert (config["rollout"]["prompts"], config["rollout"]["completions"]) == (6, 3)
    assert config["rollout"]["max_new_tokens"] == 6, "of the base"
    assert config["trainer"]["max_steps"] == 9
    assert config["trainer"]["accelerator"] == "cpu"
    assert config["model"]["init_args"]["temperature"] == 0.7
    assert config["model"]["init_args"]["policy"]["init_args"]["hidden_size"] == 32


def test_included_files_come_first_relative_to_their_file_and_nested(here, parsed, monkeypatch):
    write(
        here / "parts" / "deep" / "c.yaml",
        {"rollout": {"prompts": 1, "completions": 11, "epochs": 4}},
    )
    write(
        here / "parts" / "b.yaml",
        {"include": ["deep/c.yaml"], "rollout": {"prompts": 2, "completions": 12}},
    )
    write(
        here / "experiment" / "a.yaml",
        {"include": ["../base.yaml", "../parts/b.yaml"], "rollout": {"prompts": 3}},
    )
    monkeypatch.chdir(here / "parts")
    for arguments in (
        ["-c", "../experiment/a.yaml"],
        ["--config", "../experiment/a.yaml"],
        ["--config=../experiment/a.yaml"],
    ):
        rollout = parsed(*arguments)["rollout"]
        assert (rollout["prompts"], rollout["completions"], rollout["epochs"]) == (3, 12, 4)


def test_one_include_needs_no_list(here):
    write(here / "a.yaml", {"include": "base.yaml"})
    assert recipes.expand(["fit", "-c", "a.yaml"])[:5] == ["fit", "-c", "base.yaml", "-c", "a.yaml"]


def test_interpolation(here, parsed):
    write(
        here / "more.yaml",
        {
            "data": {"init_args": {"seed": "${seed_everything}"}},
            "rollout": {"prompts": "${trainer.max_steps}"},
            "trainer": {"default_root_dir": "run-seed${seed_everything}", "max_steps": 4},
        },
    )
    config = parsed("-c", "base.yaml", "-c", "more.yaml", "--seed_everything", 5)
    assert config["data"]["init_args"]["seed"] == 5
    assert config["trainer"]["default_root_dir"] == "run-seed5"
    assert config["rollout"]["prompts"] == 4
    assert (
        parsed("-c", "base.yaml", "-c", "more.yaml", "--trainer.max_steps", 3)["rollout"]["prompts"]
        == 3
    )


@pytest.mark.parametrize(
    "file",
    [QUICKSTART, ROOT / "configs" / "experiment" / "smollm2_svamp.yaml"],
    ids=lambda p: p.stem,
)
def test_a_printed_configuration_parses_to_itself_anywhere(here, parsed, file):
    first = parsed("-c", file)
    write(here / "elsewhere" / "printed.yaml", first)
    assert parsed("-c", "elsewhere/printed.yaml") == first
    assert first["include"] is None


def test_the_default_seed_is_fixed(here, parsed):
    content = yaml.safe_load(BASE)
    del content["seed_everything"]
    assert parsed("-c", write(here / "seedless.yaml", content))["seed_everything"] == 0


def test_rollout_is_a_section_with_defaults_and_one_callback(here, parsed, call, runs):
    config = parsed("-c", "base.yaml")
    assert config["rollout"]["minibatches"] == 1
    assert config["rollout"]["parity_gate"] is True
    assert not any("RolloutLoop" in str(callback) for callback in config["trainer"]["callbacks"])
    assert call("fit", "-c", "base.yaml") == 0
    names = [type(callback).__name__ for callback in runs[0].trainer.callbacks]
    assert names.count("RolloutLoop") == 1
    assert names[0] == "RolloutLoop"


def test_short_class_names_and_appended_callbacks(here, parsed):
    config = parsed(
        "-c", "base.yaml", "--trainer.callbacks+=Watchdog", "--trainer.callbacks.patience=5"
    )
    assert config["model"]["class_path"] == "lightning_mpo.PolicyOptimization"
    objective = config["model"]["init_args"]["objective"]
    assert objective["reduction"]["class_path"] == "lightning_mpo.TokenMean"
    assert config["data"]["class_path"].endswith(".Arithmetic")
    assert config["rollout"]["rewards"][0]["class_path"].endswith(".ExactAnswer")
    assert [c["class_path"].rsplit(".")[-1] for c in config["trainer"]["callbacks"]] == [
        "ModelCheckpoint",
        "Watchdog",
    ]
    assert config["trainer"]["callbacks"][1]["init_args"]["patience"] == 5


@pytest.mark.parametrize("file", ALGORITHMS, ids=lambda path: path.stem)
def test_an_algorithm_over_the_quickstart_leaves_nothing_of_the_quickstarts(here, parsed, file):
    """Keys overlay one by one, so that whatever a file does not set survives from the file before."""
    own = parsed("-c", "base.yaml", "--rollout.max_new_tokens", 40, "-c", file)
    over = parsed("-c", QUICKSTART, "-c", file, "--rollout.max_new_tokens", 40)
    assert over["model"]["init_args"]["objective"] == own["model"]["init_args"]["objective"]
    for name in ("dynamic", "mask_truncated"):
        assert over["rollout"][name] == own["rollout"][name]


def test_the_quickstarts_warm_up_writes_what_the_quickstart_reads(parsed, monkeypatch):
    monkeypatch.chdir(ROOT)
    for seed in (0, 3):
        first = parsed("-c", QUICKSTART, "--seed_everything", seed)
        before = parsed("-c", first["warmup"], "--seed_everything", seed)
        policies = [
            config["model"]["init_args"]["policy"]["init_args"] for config in (first, before)
        ]
        checkpoint = policies[0].pop("checkpoint")
        assert policies[1].pop("checkpoint") is None
        assert policies[0] == policies[1]
        save = before["trainer"]["callbacks"][-1]["init_args"]
        assert save["save_last"]
        assert checkpoint == f"{save['dirpath']}/last.ckpt"
        assert f"seed{seed}" in checkpoint
        assert first["data"]["class_path"] == before["data"]["class_path"]


# --- what loggers and the trainer get -----------------------------------------------------------------------------------


def test_tensorboard_has_the_configuration_in_its_file_as_well(here, call):
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "board"}}
    write(here / "o.yaml", {"trainer": {"logger": logger, "callbacks": None}})
    assert call("fit", "-c", "base.yaml", "-c", "o.yaml") == 0
    (path,) = (here / "board").rglob("hparams.yaml")
    saved = yaml.safe_load(path.read_text())
    assert saved["model.policy"] == "TinyPolicy"
    assert saved["rollout.prompts"] == 2


def test_one_callback_needs_no_list(here):
    _, _, trainer = build(["-c", "base.yaml", "--trainer.callbacks", "Watchdog"])
    assert any(isinstance(callback, Watchdog) for callback in trainer.callbacks)
