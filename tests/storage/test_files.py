"""A checkpoint of one file is whole or not there; what is read is what was written, and runs no code."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.storage import Disk, find, locate, read_checkpoint, write_file
from lightning_mpo.storage.disk import beside, remove, sha256
from lightning_mpo.storage.files import check_file


def content(value: float = 1.0) -> dict:
    return {"state_dict": {"weight": torch.full((64, 64), value)}, "global_step": 3}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    write_file(content(), path, Disk())
    return path


def test_it_reads_what_it_wrote_and_leaves_nothing_else(saved):
    state = read_checkpoint(saved)
    assert torch.equal(state["state_dict"]["weight"], content()["state_dict"]["weight"])
    assert read_checkpoint(saved, part="outline")["global_step"] == 3
    assert torch.load(saved, weights_only=True)["global_step"] == 3, "torch alone reads it as well"
    assert zipfile.is_zipfile(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


class Full(Disk):
    """Has written something when the disk is full."""

    def open(self, path):
        path.write_bytes(b"half")
        return open("/dev/full", "wb", buffering=0)


def test_a_full_disk_leaves_the_checkpoint_before(saved):
    before = saved.read_bytes()
    with pytest.raises(
        UserError,
        match=r"last\.ckpt could not be written: No space left on device; .* still the one before",
    ):
        write_file(content(2.0), saved, Full())
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_without_a_checkpoint_before(tmp_path):
    with pytest.raises(UserError, match=r"No space left on device$"):
        write_file(content(), tmp_path / "last.ckpt", Full())
    assert not list(tmp_path.iterdir())


def test_a_write_that_is_cut_off_is_not_the_checkpoint(saved, monkeypatch):
    def power_cut(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        write_file(content(2.0), saved, Disk())
    assert read_checkpoint(saved)["state_dict"]["weight"][0, 0] == 1.0
    assert [path.name for path in saved.parent.glob("*.ckpt")] == ["last.ckpt"]
    monkeypatch.undo()
    write_file(content(3.0), saved, Disk())
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"], (
        "what was left is used again"
    )


def test_it_is_on_the_disk_before_it_has_its_name(saved, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real: (done.append(name), real(*args))[1]
        )
    write_file(content(), saved, Disk())
    assert done == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("at", [100, -3000, -1])
def test_a_changed_byte_is_refused(saved, at):
    data = bytearray(saved.read_bytes())
    data[at] ^= 1
    saved.write_bytes(data)
    with pytest.raises(
        UserError, match=r"last\.ckpt' is not what was written: its checksum differs"
    ):
        read_checkpoint(saved)


@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_a_truncated_file_is_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(
        UserError,
        match=r"last\.ckpt' cannot be read as a Lightning checkpoint: it is truncated or none",
    ):
        read_checkpoint(saved)


def test_a_file_without_its_last_bytes_is_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-10])
    with pytest.raises(UserError, match="its checksum differs"):
        check_file(saved, "it")


def test_files_of_others_pass_without_a_checksum(tmp_path):
    torch.save(content(), tmp_path / "other.ckpt")
    assert read_checkpoint(tmp_path / "other.ckpt")["global_step"] == 3


class Runs:
    def __reduce__(self):
        return (print, ("code of the file's",))


def test_foreign_code_is_never_run(tmp_path, capsys):
    torch.save(content() | {"more": Runs()}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match=r"it asks to run \S*print, and code in files is never run"):
        read_checkpoint(tmp_path / "foreign.ckpt")
    assert "code of the file's" not in capsys.readouterr().out
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "plain.ckpt")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"missing\.ckpt' does not exist"):
        read_checkpoint(tmp_path / "missing.ckpt")
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match="it holds no state_dict"):
        read_checkpoint(tmp_path / "weights.ckpt")


def test_what_is_removed_is_not_found_aside(saved):
    aside = beside(saved, ".before")
    aside.write_bytes(saved.read_bytes())
    assert locate(saved) == saved
    remove(saved)
    assert not list(saved.parent.iterdir())
    remove(saved)
    aside.write_bytes(b"")
    assert locate(saved) == aside
    assert find(saved.parent, "last*.ckpt") == [aside]


def test_a_file_is_hashed_again_once_it_has_changed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"ab")
    first = sha256(path)
    assert sha256(path, 1) != first
    path.write_bytes(b"ba")
    os.utime(path, ns=(0, 0))
    assert sha256(path) != first
