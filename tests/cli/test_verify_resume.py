"""`lightning-mpo verify-resume` kills a run of one's own configuration, lets it go on, and compares."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mpo.cli import verify_resume
from lightning_mpo.resume.comparison import Comparison
from tests.support.configurations import BASE
from tests.support.peptides import write_modlamp

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--updates", "1"], "`--updates` must be from 2 to 1,000,000, got 1"),
        (["--kill", "lunch:2"], "`--kill` must be one of rollout, micro-batch, update"),
        (["--kill", "update"], "such as update:4, got 'update'"),
        (["--folder", "."], "holds runs of an earlier verification"),
        (["--kill", "update:²"], "such as update:4, got 'update:²'"),
        (["--kills", "0"], "`--kills` must be from 1 to 100,000, got 0"),
        (["--kills", "2", "--updates", "0"], "`--updates` must be from 2 to 1,000,000, got 0"),
        (["--kills", "2", "--kill", "update:1"], "give one of the two"),
    ],
)
def test_mistakes_are_one_line(here, capsys, arguments, said):
    (here / "whole").mkdir()
    assert verify_resume.main(["-c", "base.yaml", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_the_first_difference_is_named_and_the_exit_code_is_1(here, capsys, monkeypatch):
    monkeypatch.setattr(verify_resume.Runs, "__enter__", lambda self: self)
    monkeypatch.setattr(verify_resume.Runs, "__exit__", lambda *_: None)
    monkeypatch.setattr(verify_resume.Runs, "run", lambda *_, **__: True)
    found = [
        Comparison("weights", 12, None),
        Comparison("optimiser", 9, "optimiser[0]: 1 and 2"),
        Comparison("x", 1, "x"),
    ]
    monkeypatch.setattr("lightning_mpo.resume.comparison.compare_runs", lambda *_: found)
    assert verify_resume.main(["--folder", "out"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["weights", "12", "values", "bit", "for", "bit"]
    assert lines[1].split()[-1] == "differs"
    assert lines[-2] == "first difference: optimiser[0]: 1 and 2"
    assert lines[-1].startswith("two undisturbed runs differ as well (optimiser[0]: 1 and 2)")


def test_random_kills_are_drawn_from_the_events_that_there_are():
    events = {"rollout": 12, "micro-batch": 0, "update": 8}
    draws = [verify_resume.draw_kills(random.Random(seed), 3, events, 2.0) for seed in range(50)]
    kills = [kill for drawn in draws for kill in drawn]
    assert {kill.phase for kill in kills} == {"rollout", "update", "time"}
    assert all(
        0 <= kill.at <= (2.0 if kill.phase == "time" else events[kill.phase]) for kill in kills
    )
    assert all(kill.at >= 1 for kill in kills if kill.phase != "time")
    assert draws == [
        verify_resume.draw_kills(random.Random(seed), 3, events, 2.0) for seed in range(50)
    ]
    assert str(verify_resume.Kill("update", 3)) == "update:3"


@pytest.mark.slow
def test_a_configuration_is_shown_to_resume(here, capsys):
    command = [
        sys.executable,
        "-m",
        "lightning_mpo",
        "verify-resume",
        "-c",
        "base.yaml",
        "--updates",
        "4",
    ]
    done = subprocess.run(
        [*command, "--folder", "out", "--kill", "update:3"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a run killed at update:3 goes on as if it had not been" in done.stdout
    parts = (
        "weights",
        "optimiser",
        "random numbers",
        "rollout buffer",
        "prompt order",
        "metrics.csv",
    )
    assert all(
        any(line.startswith(part) and "bit for bit" in line for line in done.stdout.splitlines())
        for part in parts
    )
    late = subprocess.run(
        [*command, "--folder", "late", "--kill", "update:9"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert late.returncode == 2
    assert "the run ended before the kill at 'update:9'" in late.stderr
    assert verify_resume.main(["-c", "missing.yaml", "--folder", "no"]) == 2
    assert capsys.readouterr().err.startswith("lightning-mpo: no configuration file 'missing.yaml'")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["designed_peptides_ppo", "designed_peptides_dpo"])
def test_runs_on_peptides_resume_bit_for_bit(here, recipe):
    """With a classifier that is fitted again, a fixed support, and a critic or a reference."""
    site = f"{write_modlamp(here)}{os.pathsep}{os.environ['PYTHONPATH']}"
    options = {
        "policy.init_args.checkpoint": "null",
        "policy.init_args.hidden_size": 16,
        "policy.init_args.intermediate_size": 32,
        "policy.init_args.layers": 1,
        "policy.init_args.heads": 2,
    }
    words = [
        word for name, value in options.items() for word in (f"--model.init_args.{name}", value)
    ]
    sizes = {"prompts": 8, "completions": 1 if "ppo" in recipe else 4, "max_new_tokens": 12}
    words += [word for name, value in sizes.items() for word in (f"--rollout.{name}", value)]
    words += ["--data.init_args.validation_prompts", 4, "--trainer.val_check_interval", 2]
    words += ["--updates", 4, "--kill", "update:3", "--folder", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_mpo", "verify-resume", "-c", recipe, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=os.environ | {"PYTHONPATH": site},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a run killed at update:3 goes on as if it had not been" in done.stdout
