"""The warm-up of a configuration runs first if its checkpoint does not exist yet."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from lightning_mpo.callbacks.preemption import STAGE_CODE
from lightning_mpo.cli import stage_entry
from tests.support.commands import write
from tests.support.configurations import BASE


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

    monkeypatch.setattr(stage_entry, "run_stage", run)
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


BLOCKS = "{class_path: BlockActions, init_args: {length: 3, source: mtp}}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("data.digits", 0), "`Arithmetic.digits` must be at least 1, got 0"),
        (("rollout.completions", 1), "`rollout.completions` must be at least 2, got 1"),
        (("rollout.rewards", "[]"), "`rollout.rewards` is empty"),
        (("model.objective.actions", BLOCKS), "the policy has none; give `policy.mtp`"),
    ],
)
def test_mistakes_of_the_run_come_before_its_warm_up(call, warmed, capsys, option, message):
    assert call("fit", "-c", "warm.yaml", f"--{option[0]}", option[1]) == 2
    assert warmed.commands == []
    assert message in capsys.readouterr().err


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
    warmed.outcome.code = stage_entry.EARLY  # it has saved half of its work
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
    ("saves", "code"), [(True, stage_entry.EARLY), (False, stage_entry.EARLY), (None, 3)]
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
    assert stage_entry.run_stage([sys.executable, "-c", stage]) == code
    assert signal.getsignal(signal.SIGTERM) == before


def test_only_the_first_process_of_a_node_warms_up(call, warmed, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert call("fit", "-c", "warm.yaml") == 2
    assert warmed.commands == []
    assert "make it first: lightning-mpo fit -c warmup.yaml" in capsys.readouterr().err
