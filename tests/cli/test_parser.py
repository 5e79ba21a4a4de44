"""The command line: each trap of LightningCLI, in process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from lightning_mpo import __version__, cli, recipes
from lightning_mpo.callbacks import Watchdog
from lightning_mpo.callbacks.preemption import STAGE_CODE
from lightning_mpo.cli import parser, warmup_stage
from lightning_mpo.cli.main import main
from lightning_mpo.cli.mistakes import explain
from lightning_mpo.cli.plan_parser import build
from lightning_mpo.errors import UserError
from lightning_mpo.modules.parallel import check_alone
from lightning_mpo.policies import TinyPolicy
from tests.cli.test_bad_input import BASE

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "experiment" / "quickstart.yaml"
ALGORITHMS = sorted((ROOT / "configs" / "algorithm").glob("*.yaml"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a small configuration of a run."""
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(monkeypatch):
    """Run the command line in this process."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["lightning-mpo", *map(str, arguments)])
        return cli.run()

    return run


@pytest.fixture
def parsed(call, capsys):
    """Return the configuration that arguments give."""

    def parse(*arguments: object, verb: str = "fit") -> dict:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(verb, *arguments, "--print_config")
        assert not stop.value.code
        return yaml.safe_load(capsys.readouterr().out)

    return parse


@pytest.fixture
def runs(monkeypatch) -> list[parser.CLI]:
    """Collect what was fitted."""
    done: list[parser.CLI] = []
    monkeypatch.setattr(parser.CLI, "after_fit", lambda self: done.append(self), raising=False)
    return done


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


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


# --- runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_configuration_and_trains_with_the_optimiser_of_the_file(here, call, runs):
    write(
        here / "more.yaml",
        {
            "model": {
                "init_args": {
                    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25}}
                }
            }
        },
    )
    assert call("fit", "-c", "base.yaml", "-c", "more.yaml", "--trainer.log_every_n_steps", 1) == 0
    (optimizer,) = runs[0].trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 0.25
    policy = runs[0].model.policy
    assert {id(w) for w in optimizer.param_groups[0]["params"]} == {
        id(w) for w in policy.network.parameters()
    }
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.25
    assert (here / "run" / "metrics.csv").is_file()
    assert (here / "run" / "checkpoints" / "last.ckpt").is_file()


def test_a_saved_configuration_repeats_its_run(here, call, runs):
    assert call("fit", "-c", "base.yaml") == 0
    (here / "run" / "config.yaml").rename(here / "again.yaml")
    assert call("fit", "-c", "again.yaml") == 0
    first, second = (dict(run.model.policy.named_parameters()) for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (here / "run" / "config.yaml").read_text() == (here / "again.yaml").read_text()


def test_resuming_in_a_folder_that_has_a_configuration_and_the_command_line_beats_the_checkpoint(
    here, call, runs
):
    assert call("fit", "-c", "base.yaml") == 0
    path = here / "run" / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["hyper_parameters"] = {
        "temperature": 0.125,
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
    torch.save(state, path)
    arguments = ("--model.temperature", 0.5, "--trainer.max_steps", 2, "--ckpt_path", path)
    assert call("fit", "-c", "base.yaml", *arguments) == 0
    assert runs[1].model.temperature == 0.5
    assert runs[1].trainer.global_step == 2
    assert runs[1].model.source.counter == 2, "resumed, not begun anew"
    assert (
        yaml.safe_load((here / "run" / "config.yaml").read_text())["model"]["init_args"][
            "temperature"
        ]
        == 0.5
    )


def test_no_progress_bar_means_none_whatever_a_recipe_has(here, call, runs):
    bars = {"trainer": {"callbacks": ["RolloutProgressBar"], "enable_progress_bar": False}}
    write(here / "bars.yaml", bars)
    assert call("fit", "-c", "base.yaml", "-c", "bars.yaml") == 0
    assert not any(
        "ProgressBar" in type(callback).__name__ for callback in runs[0].trainer.callbacks
    )


def test_last_finds_the_checkpoint_of_the_same_folder(here, call, runs):
    assert call("fit", "-c", "base.yaml") == 0
    assert call("fit", "-c", "base.yaml", "--trainer.max_steps", 2, "--ckpt_path", "last") == 0
    assert runs[1].model.source.counter == 2


def test_last_begins_afresh_in_one_line_where_there_is_nothing(here, call, runs, caplog):
    with caplog.at_level("INFO"):
        assert call("fit", "-c", "base.yaml", "--ckpt_path", "last") == 0
    assert "resume     no last.ckpt in" in caplog.text
    assert runs[0].model.source.counter == 1


def test_a_resumed_run_goes_on_with_its_metrics_file(here, call):
    """A configuration names Lightning's `CSVLogger`, which would delete it."""
    more = ("--trainer.log_every_n_steps", 1)
    assert call("fit", "-c", "base.yaml", *more) == 0
    first = (here / "run" / "metrics.csv").read_text()
    assert (
        call("fit", "-c", "base.yaml", *more, "--trainer.max_steps", 2, "--ckpt_path", "last") == 0
    )
    both = (here / "run" / "metrics.csv").read_text()
    assert both.startswith(first)
    assert len(both.splitlines()) == 3
    assert (
        call("validate", "-c", "base.yaml", "--trainer.limit_val_batches", 1, "--ckpt_path", "last")
        == 0
    )
    assert (here / "run" / "metrics.csv").read_text() == both
    assert "val/pass_at_1" in (here / "run" / "metrics_validate.csv").read_text()


def test_a_checkpoint_that_a_run_cannot_go_on_from_is_refused_before_a_model_is_loaded(
    here, call, monkeypatch, capsys
):
    assert call("fit", "-c", "base.yaml") == 0
    path = here / "run" / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()

    def never(self):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(TinyPolicy, "load_network", never)

    def said(*arguments: object) -> str:
        capsys.readouterr()
        assert call("fit", "-c", "base.yaml", "--trainer.max_steps", 2, *arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        return next(line for line in lines if line.startswith("lightning-mpo: "))

    wider = ("--model.policy.init_args.hidden_size", 64)
    assert "hidden_size 32, the configuration 64" in said("--ckpt_path", "last", *wider)
    algorithm = said(
        "--ckpt_path", path, "--model.init_args.objective.surrogate.init_args.high", 0.3
    )
    assert "`policy.checkpoint` instead of `--ckpt_path`" in algorithm
    two = said("--ckpt_path", "last", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    assert "was saved by 1 processes and cannot be resumed by 2" in two
    path.write_bytes(whole[:1000])
    assert "truncated" in said("--ckpt_path", "last")
    path.write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    assert "its checksum differs" in said("--ckpt_path", "last")
    (here / "file").write_text("")
    assert "cannot be written (Not a directory)" in said("--trainer.default_root_dir", "file/run")


def test_only_a_run_that_begins_writes_a_configuration(here, call, capsys):
    assert call("fit", "-c", "base.yaml") == 0
    config = (here / "run" / "config.yaml").read_text()
    assert call("fit", "-c", "base.yaml", "--rollout.completions", 1) == 2
    path = here / "run" / "checkpoints" / "last.ckpt"
    assert (
        call("validate", "-c", "base.yaml", "--trainer.limit_val_batches", 1, "--ckpt_path", path)
        == 0
    )
    assert (here / "run" / "config.yaml").read_text() == config
    assert "val/pass_at_1" in capsys.readouterr().out


def test_a_run_that_is_stopped_as_it_begins_leaves_the_configuration_whole(here, call, monkeypatch):
    assert call("fit", "-c", "base.yaml") == 0
    path = here / "run" / "config.yaml"
    config = path.read_text()
    dump = parser.LightningArgumentParser.dump

    def stop(parser, *arguments, **options):
        if options.get("skip_none") is False:
            raise KeyboardInterrupt
        return dump(parser, *arguments, **options)

    monkeypatch.setattr(parser.LightningArgumentParser, "dump", stop)
    with pytest.raises(SystemExit):
        call("fit", "-c", "base.yaml")
    assert path.read_text() == config


def test_fast_dev_run_writes_nothing(here, call, capsys):
    base = yaml.safe_load(BASE)
    names = [
        ("Report", {"problems": 2, "completions": 2}),
        ("Samples", {"every": 1}),
        ("MemoryAccounting", {}),
    ]
    names += [("PromptOrder", {}), ("Export", {}), ("Heartbeat", {})]
    base["trainer"]["callbacks"] += [
        {"class_path": name, "init_args": options} for name, options in names
    ]
    (here / "base.yaml").write_text(yaml.safe_dump(base))

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}

    quick = ("fit", "-c", "base.yaml", "--trainer.fast_dev_run", "true")
    assert call(*quick) == 0
    assert files().keys() == {here / "base.yaml"}
    assert call("fit", "-c", "base.yaml") == 0
    earlier = files()
    names = {
        "summary.json",
        "learning_curve.png",
        "rollouts.jsonl",
        "final.jsonl",
        "memory.json",
        "memory.png",
        "prompts.jsonl",
    }
    assert names <= {path.name for path in earlier}
    capsys.readouterr()
    assert call(*quick, "--seed_everything", 1) == 0
    assert "2 held-out problems, 95 % intervals" in capsys.readouterr().out
    assert files() == earlier


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_mpo.cli.main.run", interrupt)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "lightning-mpo: stopped by Ctrl-C\n"


def test_other_errors_keep_their_traceback(here, call, monkeypatch):
    from lightning_mpo.policies import TinyPolicy

    def broken(self):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(TinyPolicy, "load_network", broken)
    with pytest.raises(ValueError, match="a bug of ours"):
        call("fit", "-c", "base.yaml")


# --- warm-up ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def warmed(here, monkeypatch):
    """A configuration with a warm-up whose process is only written down."""
    commands: list[list[str]] = []
    outcome = SimpleNamespace(code=0, writes=True)

    def run(command):
        commands.append(command)
        if outcome.writes:
            policy = yaml.safe_load(BASE)["model"]["init_args"]["policy"]["init_args"]
            from lightning_mpo.policies import TinyPolicy

            made = TinyPolicy(**policy)
            made.build(device=torch.device("cpu"), reference=False)
            state = {f"policy.{key}": value for key, value in made.state_dict().items()}
            torch.save({"state_dict": state}, "warm.ckpt")
        return outcome.code

    monkeypatch.setattr(warmup_stage, "run_stage", run)
    (here / "warmup.yaml").write_text("{}")
    write(
        here / "warm.yaml",
        {
            "include": ["base.yaml"],
            "warmup": "warmup.yaml",
            "model": {"init_args": {"policy": {"init_args": {"checkpoint": "warm.ckpt"}}}},
        },
    )
    return SimpleNamespace(commands=commands, outcome=outcome)


def test_the_warm_up_runs_where_its_checkpoint_is_missing(call, warmed, runs):
    assert call("fit", "-c", "warm.yaml", "--seed_everything", 4) == 0
    assert warmed.commands == [
        [
            sys.executable,
            "-m",
            "lightning_mpo",
            "fit",
            "-c",
            "warmup.yaml",
            "--seed_everything",
            "4",
        ]
    ]
    assert call("fit", "-c", "warm.yaml", "--seed_everything", 4) == 0
    assert len(warmed.commands) == 1, "the checkpoint is there"
    assert len(runs) == 2


def test_other_verbs_run_no_warm_up(call, warmed, capsys):
    assert call("validate", "-c", "warm.yaml") == 2
    assert warmed.commands == []
    assert "`policy.checkpoint` 'warm.ckpt' does not exist" in capsys.readouterr().err


def test_a_warm_up_that_fails(call, warmed, capsys):
    warmed.outcome.code, warmed.outcome.writes = 3, False
    assert call("fit", "-c", "warm.yaml") == 2
    assert "the warm-up stage 'warmup.yaml' failed with exit code 3" in capsys.readouterr().err
    warmed.outcome.code = 0
    assert call("fit", "-c", "warm.yaml") == 2
    assert (
        "the warm-up stage 'warmup.yaml' did not write `policy.checkpoint` 'warm.ckpt'"
        in capsys.readouterr().err
    )


def test_a_warm_up_that_was_stopped_goes_on(call, warmed, runs, capsys):
    warmed.outcome.code = warmup_stage.EARLY  # it has saved half of its work
    with pytest.raises(SystemExit) as stop:
        call("fit", "-c", "warm.yaml")
    assert stop.value.code == 0
    assert "the same command goes on with it" in capsys.readouterr().out
    warmed.outcome.code = 1
    assert call("fit", "-c", "warm.yaml") == 2
    assert "to begin it afresh, delete warm.ckpt" in capsys.readouterr().err
    warmed.outcome.code = 0
    assert call("fit", "-c", "warm.yaml") == 0
    assert [command[8:] for command in warmed.commands] == [[], *[["--ckpt_path", "warm.ckpt"]] * 2]
    assert len(runs) == 1
    assert call("fit", "-c", "warm.yaml") == 0
    assert len(warmed.commands) == 3, "it has ended"


@pytest.mark.parametrize(
    ("saves", "code"), [(True, warmup_stage.EARLY), (False, warmup_stage.EARLY), (None, 3)]
)
def test_a_stage_is_stopped_with_the_run_that_waits_for_it(tmp_path, monkeypatch, saves, code):
    ends = "signal.signal(15, lambda *_: os._exit(int(os.environ[NAME])))" if saves else "pass"
    wait = (
        f"open({str(tmp_path / 'up')!r}, 'w').close(); time.sleep(60)"
        if saves is not None
        else "os._exit(3)"
    )
    stage = f"import os, signal, time; NAME = {STAGE_CODE!r}; {ends}; {wait}"
    before = signal.getsignal(signal.SIGTERM)

    def ask():
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if saves is not None:
        threading.Thread(target=ask, daemon=True).start()
    assert warmup_stage.run_stage([sys.executable, "-c", stage]) == code
    assert signal.getsignal(signal.SIGTERM) == before


def test_only_the_first_process_of_a_node_warms_up(call, warmed, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert call("fit", "-c", "warm.yaml") == 2
    assert warmed.commands == []
    assert "make it first: lightning-mpo fit -c warmup.yaml" in capsys.readouterr().err


# --- the environment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "WORLD_SIZE"]
)
@pytest.mark.parametrize("value", ["x", "", "-1", "²"])
def test_a_process_number_that_is_none_is_refused_before_lightning_reads_it(
    monkeypatch, capsys, name, value
):
    monkeypatch.setenv(name, value)
    assert main(["fit", "-c", "missing.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"lightning-mpo: the environment variable {name} is {value!r}, which is no number of a process"
    )


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_one_process_that_is_called_a_later_one_is_refused(here, call, capsys, monkeypatch, name):
    """It would train, save checkpoints and write no metrics."""
    monkeypatch.setenv(name, "3")
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    assert call("fit", "-c", "base.yaml") == 2
    assert f"{name} is 3, which makes this one of several processes" in capsys.readouterr().err
    check_alone(SimpleNamespace(world_size=4))


def test_a_run_from_python_imports_from_the_working_folder(here, capsys, monkeypatch):
    (here / "rewards_from_here.py").write_text("def f(completions): return [1.0]\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(here))])
    assert cli.run(["fit", "-c", "base.yaml", "--rollout.rewards", "[rewards_from_here.g]"]) == 2
    assert "no `g` in `rewards_from_here`" in capsys.readouterr().err


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


# --- the entry point ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_the_verbs(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["lightning-mpo", *arguments])
    assert main() == 0
    shown = capsys.readouterr().out
    for word in ("fit", "validate", "test", "predict", "methods", "-c NAME", "-c quickstart"):
        assert word in shown
    for line in shown.partition("examples:")[2].splitlines():
        for name in re.findall(r"-c (\S+)", line):
            assert recipes.find(name).is_file(), f"the help names {name}"


def test_a_reward_of_the_working_folder_is_found_by_the_console_command(here, runs, monkeypatch):
    """`lightning-mpo` has the folder of the script on its path, and not the working folder, as `python -m` has."""
    text = "from lightning_mpo.rewards import Reward\nclass Ends(Reward):\n    is_accuracy = True\n"
    text += "    def score(self, completions):\n        return [float(c.text.endswith(c.target)) for c in completions]\n"
    (here / "my_rewards_here.py").write_text(text)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(here))])
    assert main(["fit", "-c", "base.yaml", "--rollout.rewards", "[my_rewards_here.Ends]"]) == 0
    (run,) = runs
    (rollout,) = [c for c in run.trainer.callbacks if type(c).__name__ == "RolloutLoop"]
    assert [type(reward).__name__ for reward in rollout.rewards] == ["Ends"]


def test_a_run_from_python_reads_files_as_the_command_line_does(here, call, runs, capsys):
    write(here / "more.yaml", {"include": "base.yaml", "trainer": {"max_steps": 2}})
    assert cli.run(["fit", "-c", "more.yaml", "--rollout.prompts", 4]) == 0
    assert runs[0].trainer.global_step == 2
    own = parser.OPTIONS | {"args": ["-c", "more.yaml"], "run": False, "save_config_callback": None}
    assert parser.CLI(**own).trainer.max_steps == 2, "with Lightning's own class as well"
    with pytest.raises(UserError, match="`include` stands in files"):
        parser.CLI(**own | {"args": {"include": ["base.yaml"]}})
    assert cli.run(["configs", "show", "grop"]) == 2
    assert cli.run(["fti"]) == 2
    assert "no verb 'fti'; did you mean `fit`?" in capsys.readouterr().err
    assert cli.run([]) == 0
    assert capsys.readouterr().out.startswith("usage: lightning-mpo")


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-mpo", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"lightning-mpo {__version__}\n"


def test_help_is_quick_and_a_mistake_exits_with_two(tmp_path):
    """Help loads no large library: that takes seconds, and can be seen without a clock."""
    code = (
        "import sys; from lightning_mpo.cli.main import main; main(['--help']); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: lightning-mpo"), done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert "lightning_mpo.cli.main" in loaded
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & set(loaded)
    done = subprocess.run(
        [sys.executable, "-m", "lightning_mpo", "fot"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr == "lightning-mpo: no verb 'fot'; did you mean `fit`?\n"


def _raised_by_us() -> Exception:
    """An exception that comes out of this package, as a fault of its own would."""
    from lightning_mpo.checks import within

    try:
        within("A", "no interval", x=1)
    except ValueError as error:
        return error
    raise AssertionError


def test_the_mistake_behind_an_error_is_found():
    mistake, wrapped = UserError("mend this"), ValueError("wrapped")
    wrapped.__cause__ = mistake
    assert explain(wrapped) == "mend this"
    outer = ValueError("raised while another was handled")
    outer.__context__ = wrapped
    assert explain(outer) == "mend this"
    assert explain(_raised_by_us()) is None
