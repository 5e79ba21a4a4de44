"""A checkpoint that is a folder is whole or does not exist."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightning_mpo.errors import UserError
from lightning_mpo.policies.checkpoints import read_policy
from lightning_mpo.storage import Disk, find, locate, read_checkpoint, write_file
from lightning_mpo.storage.shards import MANIFEST, METADATA, REST
from tests.support.shards import NAME, SHARD, write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_reads_what_it_wrote_and_leaves_nothing_else(saved):
    content = read_checkpoint(saved)
    assert torch.equal(content["state_dict"][NAME], torch.ones(16, 16))
    assert content["optimizer_states"][0]["state"][NAME]["step"] == 3.0
    assert content["optimizer_states"][0]["param_groups"] == [{"lr": 0.1, "params": [NAME]}]
    assert content["global_step"] == 1
    assert names(saved.parent) == ["last.ckpt"]
    assert names(saved) == [METADATA, SHARD, MANIFEST, REST]
    listed = json.loads((saved / MANIFEST).read_text())["files"]
    assert {name: part["size"] for name, part in listed.items()} == {
        name: (saved / name).stat().st_size for name in (METADATA, SHARD, REST)
    }
    assert str(saved.parent).encode() not in (saved / METADATA).read_bytes()


def test_an_outline_has_shapes_and_weights_have_no_optimiser(saved):
    found = read_checkpoint(saved, part="outline")
    assert found["global_step"] == 1
    assert found["state_dict"][NAME].shape == (16, 16)
    assert found["state_dict"][NAME].is_meta
    assert read_checkpoint(saved, part="weights")["optimizer_states"] == []
    assert torch.equal(read_policy(str(saved))["state_dict"]["network.weight"], torch.ones(16, 16))


class Cut(Disk):
    """Stops at the n-th call of a kind, as a kill would."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.left = kind, count

    def passed(self, kind: str) -> None:
        self.left -= kind == self.kind
        if self.left == 0:
            raise KeyboardInterrupt

    def open(self, path):
        self.passed("open")
        return super().open(path)

    def rename(self, source, target):
        self.passed("rename")
        super().rename(source, target)


@pytest.mark.parametrize(
    ("kind", "count"),
    [("open", 1), ("open", 2), ("open", 3), ("open", 4), ("rename", 1), ("rename", 2)],
)
def test_wherever_a_write_is_cut_off_a_checkpoint_is_there(saved, kind, count):
    with pytest.raises((KeyboardInterrupt, dcp.api.CheckpointException)):
        write(saved, 2.0, Cut(kind, count))
    assert read_checkpoint(saved)["global_step"] == 1
    assert find(saved.parent, "last*.ckpt") == [locate(saved)]
    assert saved.exists() == ((kind, count) != ("rename", 2)), (
        "between the two renames it is only aside"
    )
    write(saved, 3.0)
    assert read_checkpoint(saved)["global_step"] == 3
    assert names(saved.parent) == ["last.ckpt"], "what was left is removed"


def test_a_kill_while_the_one_before_is_removed_leaves_the_new_one(saved, monkeypatch):
    def die(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            write(saved, 2.0)
    assert names(saved.parent) == [".last.ckpt.before", "last.ckpt"]
    assert read_checkpoint(saved)["global_step"] == 2
    write(saved, 3.0)
    assert names(saved.parent) == ["last.ckpt"]


class Full(Disk):
    def __init__(self, name: str) -> None:
        self.name = name

    def open(self, path):
        return (
            open("/dev/full", "wb", buffering=0) if path.name == self.name else super().open(path)
        )


@pytest.mark.parametrize("name", [SHARD, f"{METADATA}.tmp", REST, MANIFEST])
def test_a_full_disk_leaves_the_checkpoint_before(saved, name):
    with pytest.raises(
        UserError,
        match=r"last\.ckpt could not be written: No space left on device; .* still the one",
    ):
        write(saved, 2.0, Full(name))
    assert read_checkpoint(saved)["global_step"] == 1
    assert names(saved.parent) == ["last.ckpt"]


def test_a_folder_that_cannot_be_written_is_said(saved):
    (saved.parent / "file").write_text("")
    with pytest.raises(UserError, match="could not be written: Not a directory$"):
        write(saved.parent / "file" / "last.ckpt")


def test_the_manifest_is_written_last_and_on_the_disk_before_the_name(saved, monkeypatch):
    done = []

    class Watched(Disk):
        def open(self, path):
            done.append(path.name)
            return super().open(path)

        def rename(self, source, target):
            done.append(target.name)
            super().rename(source, target)

    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), real(handle))[1])
    write(saved, 2.0, Watched())
    assert done == [SHARD, "fsync", f"{METADATA}.tmp", "fsync", REST, "fsync", MANIFEST, "fsync", "fsync",
                    ".last.ckpt.before", "fsync", "last.ckpt", "fsync"]  # fmt: skip


def test_files_and_folders_take_each_others_place(saved):
    write_file({"state_dict": {}, "global_step": 7}, saved, Disk())
    assert saved.is_file()
    assert names(saved.parent) == ["last.ckpt"]
    write(saved, 2.0)
    assert read_checkpoint(saved)["global_step"] == 2
    assert names(saved.parent) == ["last.ckpt"]
