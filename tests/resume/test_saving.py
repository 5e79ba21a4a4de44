"""What Lightning is given to write and read with, and folders that cannot be written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_mpo.errors import UserError
from lightning_mpo.resume.saving import AtomicCheckpointIO, check_folders, save_whole


def test_what_is_read_is_shown_to_the_check(tmp_path):
    seen = []
    io = AtomicCheckpointIO(lambda path, state: seen.append((path, state["global_step"])))
    io.save_checkpoint({"state_dict": {}, "global_step": 3}, tmp_path / "last.ckpt")
    assert io.load_checkpoint(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 3
    assert seen == [(tmp_path / "last.ckpt", 3)]
    io.remove_checkpoint(tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_code_is_not_run_whatever_is_asked(tmp_path):
    torch.save({"state_dict": {}, "more": SimpleNamespace()}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="asks to run types.SimpleNamespace"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "foreign.ckpt", weights_only=False)


def test_a_plugin_of_the_users_stays():
    class Other(TorchCheckpointIO):
        pass

    strategy = SimpleNamespace(checkpoint_io=Other())
    save_whole(strategy, None)  # type: ignore[arg-type]
    assert type(strategy.checkpoint_io) is Other


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    check_folders([tmp_path / "new" / "run"])
    assert not list((tmp_path / "new" / "run").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/run' cannot be written \(Not a directory\): give another"
    ):
        check_folders([tmp_path, tmp_path / "file" / "run"])
