"""A checkpoint is whole or not there; what is read is what was written, and runs no code."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.modules.storage import AtomicCheckpointIO, check_digest, check_folders, read_checkpoint


def content(value: float = 1.0) -> dict:
    return {"state_dict": {"weight": torch.full((64, 64), value)}, "global_step": 3}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(), path)
    return path


def test_it_reads_what_it_wrote_and_leaves_nothing_else(saved):
    state = AtomicCheckpointIO().load_checkpoint(saved)
    assert torch.equal(state["state_dict"]["weight"], content()["state_dict"]["weight"])
    assert read_checkpoint(saved, mmap=True)["global_step"] == 3
    assert torch.load(saved, weights_only=True)["global_step"] == 3, "torch alone reads it as well"
    assert zipfile.is_zipfile(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


class Full(AtomicCheckpointIO):
    """Has written something when the disk is full."""

    def open(self, path):
        path.write_bytes(b"half")
        return open("/dev/full", "wb", buffering=0)


def test_a_full_disk_leaves_the_checkpoint_before(saved):
    before = saved.read_bytes()
    with pytest.raises(
        UserError, match=r"last\.ckpt could not be written: No space left on device; .* still the one before"
    ):
        Full().save_checkpoint(content(2.0), saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_without_a_checkpoint_before(tmp_path):
    with pytest.raises(UserError, match=r"No space left on device$"):
        Full().save_checkpoint(content(), tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_write_that_is_cut_off_is_not_the_checkpoint(saved, monkeypatch):
    def power_cut(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint(content(2.0), saved)
    assert read_checkpoint(saved)["state_dict"]["weight"][0, 0] == 1.0
    assert [path.name for path in saved.parent.glob("*.ckpt")] == ["last.ckpt"]
    monkeypatch.undo()
    AtomicCheckpointIO().save_checkpoint(content(3.0), saved)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"], "what was left is used again"


def test_it_is_on_the_disk_before_it_has_its_name(saved, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append(name), real(*args))[1])
    AtomicCheckpointIO().save_checkpoint(content(), saved)
    assert done == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("at", [100, -3000, -1])
def test_a_changed_byte_is_refused(saved, at):
    data = bytearray(saved.read_bytes())
    data[at] ^= 1
    saved.write_bytes(data)
    with pytest.raises(UserError, match=r"last\.ckpt is not what was written: its checksum differs"):
        AtomicCheckpointIO().load_checkpoint(saved)


@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_a_truncated_file_is_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read: it is truncated or no checkpoint"):
        AtomicCheckpointIO().load_checkpoint(saved)


def test_a_file_without_its_last_bytes_is_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-10])
    with pytest.raises(UserError, match="its checksum differs"):
        check_digest(saved)


def test_files_of_others_pass_without_a_checksum(tmp_path):
    torch.save(content(), tmp_path / "other.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "other.ckpt")["global_step"] == 3


class Runs:
    def __reduce__(self):
        return (print, ("code of the file's",))


def test_foreign_code_is_never_run(tmp_path, capsys):
    torch.save(content() | {"more": Runs()}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="it holds objects other than tensors and plain values"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "foreign.ckpt", weights_only=False)
    assert "code of the file's" not in capsys.readouterr().out
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="cannot be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "plain.ckpt")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "missing.ckpt")
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.ckpt")
    with pytest.raises(UserError, match="it holds no state_dict"):
        read_checkpoint(tmp_path / "weights.ckpt")


def test_what_is_read_is_shown_to_the_check(saved):
    seen = []
    AtomicCheckpointIO(lambda path, state: seen.append((path, state["global_step"]))).load_checkpoint(saved)
    assert seen == [(saved, 3)]


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    check_folders([tmp_path / "new" / "run"])
    assert not list((tmp_path / "new" / "run").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run' cannot be written \(Not a directory\): give another"):
        check_folders([tmp_path, tmp_path / "file" / "run"])
