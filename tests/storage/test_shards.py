"""A checkpoint that is a folder is whole or not there; damage is named, and nothing in it is run."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_mpo.errors import UserError
from lightning_mpo.policies.checkpoints import read_policy
from lightning_mpo.storage import (
    Disk,
    find,
    is_shards,
    locate,
    read_checkpoint,
    write_file,
    write_folder,
)
from lightning_mpo.storage.shards import CLASSES, MANIFEST, METADATA, REST

SHARD = "__0_0.distcp"
NAME = "policy.network.weight"


def write(path: Path, value: float = 1.0, disk: Disk | None = None) -> Path:
    weight = torch.full((16, 16), value)
    optimizer = {
        "state": {NAME: {"step": torch.tensor(3.0)}},
        "param_groups": [{"lr": 0.1, "params": [NAME]}],
    }
    shards = {"state_dict": {NAME: weight}, "optimizer_0": optimizer}
    write_folder(shards, {"global_step": int(value), "mtp": None}, path, disk or Disk())
    return path


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path / "deep" / "last.ckpt")


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


# --- writing ------------------------------------------------------------------------------------------------------------


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


# --- damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARD, REST, METADATA])
@pytest.mark.parametrize("part", ["outline", "all"])
def test_a_changed_byte_is_named(saved, name, part):
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(
        UserError, match=rf"last\.ckpt' is damaged: '{name}' is not what was written"
    ):
        read_checkpoint(saved, part=part)


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("kept", [None, 0, 1000])
def test_a_missing_or_truncated_shard_is_named_with_a_manifest_and_without(saved, manifest, kept):
    if not manifest:
        (saved / MANIFEST).unlink()
    data = (saved / SHARD).read_bytes()
    (saved / SHARD).unlink()
    if kept is not None:
        (saved / SHARD).write_bytes(data[:kept])
    with pytest.raises(
        UserError, match=rf"'{SHARD}' is {'missing' if kept is None else 'truncated'}"
    ):
        read_checkpoint(saved, part="outline")


def test_folders_of_others_pass_without_a_manifest(saved):
    (saved / MANIFEST).unlink()
    assert read_checkpoint(saved)["global_step"] == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": {"meta.pt": 3}}'])
def test_a_manifest_that_is_none_is_refused(saved, text):
    (saved / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"is damaged: manifest\.json cannot be read"):
        read_checkpoint(saved)


def test_a_folder_without_metadata_is_no_checkpoint(saved, tmp_path):
    (saved / METADATA).unlink()
    assert is_shards(saved)
    for read in (read_checkpoint, lambda path: read_policy(str(path))):
        with pytest.raises(
            UserError, match=r"last\.ckpt' is a folder without \.metadata: no checkpoint"
        ):
            read(saved)
    with pytest.raises(UserError, match=r"is a folder without \.metadata: no checkpoint"):
        read_checkpoint(tmp_path)


# --- what a folder may do -------------------------------------------------------------------------------------------------


class Runs:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def unlisted(folder: Path) -> Path:
    """Take the manifest away, as who changes a file on purpose would."""
    (folder / MANIFEST).unlink()
    return folder


def test_code_in_metadata_is_not_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (unlisted(saved) / METADATA).write_bytes(pickle.dumps(Runs()))
    with pytest.raises(
        UserError,
        match=r"last\.ckpt' is refused: \.metadata asks to run \w+\.mkdir, and code in files is",
    ):
        read_checkpoint(saved, part="outline")
    assert not Path("executed").exists()
    pickle.loads((saved / METADATA).read_bytes())
    assert Path("executed").exists(), "it would have been"


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "torch load", "torch.serialization load", "torch.hub load", "os system"],
)
def test_names_beside_the_allowed_ones_are_refused(saved, name):
    (unlisted(saved) / METADATA).write_bytes(f"c{name.replace(' ', chr(10))}\n.".encode())
    with pytest.raises(UserError, match=f"asks to run {name.replace(' ', '.')}, and code"):
        read_checkpoint(saved)
    assert all(not hasattr(builtins, name) for _, name in CLASSES)


def test_a_part_outside_of_the_folder_is_not_read(saved):
    found = pickle.loads((saved / METADATA).read_bytes())
    for info in found.storage_data.values():
        info.relative_path = "../elsewhere"
    (unlisted(saved) / METADATA).write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match=r"names '\.\./elsewhere', which is outside of the folder"):
        read_checkpoint(saved)


def test_code_in_the_rest_is_not_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"more": Runs()}, unlisted(saved) / REST)
    with pytest.raises(
        UserError, match=r"it asks to run \w+\.mkdir, and code in files is never run"
    ):
        read_checkpoint(saved)
    assert not Path("executed").exists()


def test_code_in_a_plain_value_of_a_shard_is_not_run(saved, tmp_path, monkeypatch):
    """Torch's own planner loads these with pickle."""
    monkeypatch.chdir(tmp_path)
    found = pickle.loads((unlisted(saved) / METADATA).read_bytes())
    place = next(info for index, info in found.storage_data.items() if "param_groups" in index.fqn)
    bad = io.BytesIO()
    torch.save(Runs(), bad)
    shard = saved / SHARD
    place.offset, place.length = shard.stat().st_size, len(bad.getvalue())
    shard.write_bytes(shard.read_bytes() + bad.getvalue())
    (saved / METADATA).write_bytes(pickle.dumps(found))
    with pytest.raises(
        UserError, match=r"it asks to run \w+\.mkdir, and code in files is never run"
    ):
        read_checkpoint(saved)
    assert not Path("executed").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(saved, tmp_path / "whole.pt")
    assert Path("executed").exists(), "torch itself runs it"
