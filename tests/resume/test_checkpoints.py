"""`--ckpt_path last` goes on from the newest whole checkpoint, or says that there is none."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.errors import UserError
from lightning_mpo.resume.checkpoints import find_checkpoint
from tests.support.runs import make_trainer

LOGGER = "lightning.pytorch.utilities.rank_zero"  # others set its level


def settle(folder: Path, wanted: str | None = "last", stage: str = "fit") -> str | None:
    trainer = make_trainer(folder, [ModelCheckpoint(folder / "checkpoints")])
    return find_checkpoint(trainer, torch.nn.Module(), wanted, stage=stage)  # type: ignore[arg-type]


def test_last_begins_afresh_in_one_line_where_there_is_none(tmp_path, caplog):
    with caplog.at_level("INFO", logger=LOGGER):
        assert settle(tmp_path) is None
    assert f"no last.ckpt in {tmp_path}/checkpoints: starting afresh" in caplog.text
    assert "to go on" not in caplog.text
    with pytest.raises(UserError, match=r"there is no last\.ckpt in"):
        settle(tmp_path, stage="validate")
    assert settle(tmp_path, None) is None


def test_a_run_that_begins_afresh_names_what_an_earlier_one_left_by_lightnings_default(
    tmp_path, caplog
):
    for version in (9, 10):
        folder = tmp_path / "lightning_logs" / f"version_{version}" / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "epoch=0-step=3.ckpt").write_bytes(b"")
        os.utime(folder / "epoch=0-step=3.ckpt", (version, version))
    with caplog.at_level("INFO", logger=LOGGER):
        assert settle(tmp_path) is None
    assert (
        f"afresh (to go on from an earlier run: --ckpt_path '{folder}/epoch=0-step=3.ckpt')"
        in caplog.text
    )


def test_last_takes_the_newest_whole_file_and_names_it(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    loop = make_trainer(folder, []).fit_loop
    loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 7
    content = {"state_dict": {}, "global_step": 7, "callbacks": {}, "lr_schedulers": []}
    content["loops"] = {"fit_loop": loop.state_dict()}
    torch.save(content | {"pytorch-lightning_version": L.__version__}, folder / "last.ckpt")
    (folder / ".last.ckpt.part").write_bytes(b"half")
    (folder / "epoch=9.ckpt").write_bytes(b"other")
    with (
        caplog.at_level("INFO", logger=LOGGER),
        pytest.warns(UserWarning, match="no checksum of this package"),
    ):
        assert settle(tmp_path) == str(folder / "last.ckpt")
    assert "last.ckpt, update 7" in caplog.text
    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:100])
    with pytest.raises(
        UserError,
        match=r"last\.ckpt' cannot be read .* it is truncated.*there is also .*epoch=9\.ckpt",
    ):
        settle(tmp_path)
