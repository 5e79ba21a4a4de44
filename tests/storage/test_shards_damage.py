"""Damage in a folder of shards is named, and no code in it is run."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_mpo.errors import UserError
from lightning_mpo.policies.checkpoints import read_policy
from lightning_mpo.storage import is_shards, read_checkpoint
from lightning_mpo.storage.shard_reading import CLASSES
from lightning_mpo.storage.shards import MANIFEST, METADATA, REST
from tests.support.shards import SHARD

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
