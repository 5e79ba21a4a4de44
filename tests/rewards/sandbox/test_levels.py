"""The level of isolation: bubblewrap where it works, else a refusal in one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.sandbox import levels, strongest_level
from tests.support.sandboxes import isolating_level


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the only folder in which programs are looked for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(levels, "_bubblewrap", levels._bubblewrap.__wrapped__)
    return tmp_path


def fake(folder: Path, script: str) -> None:
    path = folder / "bwrap"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_bubblewrap_is_taken_if_it_works() -> None:
    level = isolating_level()
    assert level.isolated
    assert level == strongest_level(allow_weak=True)
    command = level.command(7, None)
    assert "--unshare-net" in command
    assert "--remount-ro" in command
    covers = [command[i + 1] for i, word in enumerate(command) if word == "--tmpfs"]
    fixed = [command[i + 1] for i, word in enumerate(command) if word == "--remount-ro"]
    assert set(covers) < set(fixed), "a program of the same user could write there"


def test_without_bubblewrap_programs_are_refused(tools: Path) -> None:
    with pytest.raises(
        UserError, match="cannot be isolated here: bubblewrap is not installed"
    ) as error:
        strongest_level(allow_weak=False)
    assert "`allow_weak: true`" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("script", "obstacle"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions"),
        ("exit 0", "it prints nothing"),
        ("echo 8", "does not work"),
    ],
)
def test_a_bubblewrap_that_does_not_work_is_as_none(
    tools: Path, script: str, obstacle: str
) -> None:
    fake(tools, script)
    with pytest.raises(UserError, match=obstacle):
        strongest_level(allow_weak=False)


def test_the_weak_level_has_to_be_allowed(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    level = strongest_level(allow_weak=True)
    assert not level.isolated
    assert level.name == "limits alone, as bubblewrap is not installed"
    assert level.command(7, None)[0] != "bwrap"


def test_root_needs_an_interpreter_that_others_can_read(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    (tools / "closed").mkdir(mode=0o700)
    monkeypatch.setattr(levels, "_library", lambda: tools / "closed" / "os.py")
    with pytest.raises(
        UserError, match="programs must not run as root, and other users cannot read"
    ):
        strongest_level(allow_weak=True)


def test_identities_differ_between_sandboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    first, second = levels.user_of_programs(1), levels.user_of_programs(2)
    assert first is not None
    assert second is not None
    assert abs(first - second) >= 2, "the judge has the number between"
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert levels.user_of_programs(1) is None


def test_a_machine_whose_calls_cannot_be_filtered_is_weak(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tools, "echo 7")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UserError, match="x86-64 and arm64"):
        strongest_level(allow_weak=False)


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(UserError, match="on Linux only"):
        strongest_level(allow_weak=True)


def test_the_interpreter_is_the_one_behind_the_environment() -> None:
    assert levels._interpreter().is_file()
    assert levels._interpreter().is_relative_to(Path(sys.base_prefix).resolve())
