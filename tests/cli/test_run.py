"""Runs from the command line: their files, resumes and interrupts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_mpo.cli import parser
from lightning_mpo.cli.main import main
from lightning_mpo.policies import TinyPolicy
from tests.support.commands import write
from tests.support.configurations import BASE


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
