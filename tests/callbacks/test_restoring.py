"""Checkpoints with entries of another kind: one line each, on the way to `fit` and to `validate`."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import ExactResume, Rollout
from lightning_mpo.callbacks.checkpoints import settle_checkpoint
from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.storage import read_checkpoint
from lightning_mpo.storage.reading import ENTRIES
from tests.modules.runs import Digits, adam, make_data, make_objective, make_policy

WEIGHT = "policy.network.model.embed_tokens.weight"


def go(folder: Path, path: Path | None, steps: int, stage: str = "fit") -> None:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        max_steps=steps, num_sanity_val_steps=0, limit_val_batches=1, accumulate_grad_batches=2,
        val_check_interval=1000, check_val_every_n_epoch=None, default_root_dir=folder,
        callbacks=[
            Rollout([Digits()], prompts=4, completions=2, minibatches=2, max_new_tokens=5),
            ExactResume(),
            ModelCheckpoint(dirpath=folder / "c", save_last=True, every_n_train_steps=1),
        ],
    )  # fmt: skip
    module = PolicyOptimization(make_policy(), make_objective(), optimizer=adam())
    if path is not None:
        settle_checkpoint(trainer, module, str(path), stage=stage)
    getattr(trainer, stage)(module, datamodule=make_data(), ckpt_path=path, weights_only=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("run")
    go(folder, None, 3)
    return torch.load(folder / "c" / "last.ckpt", weights_only=True)


def changed(content: dict, place: tuple, other: object, tmp_path: Path) -> Path:
    content = copy.deepcopy(content)
    part = content
    for key in place[:-1]:
        part = part[key]
    if other is ...:
        del part[place[-1]]
    else:
        part[place[-1]] = other
    torch.save(content, tmp_path / "other.ckpt")
    return tmp_path / "other.ckpt"


def test_the_checkpoint_itself_goes_on(saved, tmp_path):
    go(tmp_path, changed(saved, ("epoch",), saved["epoch"], tmp_path), 4)


def test_the_entries_are_those_of_a_checkpoint(saved):
    assert set(saved) - set(ENTRIES) <= {"hparams_name", "MixedPrecision"}


@pytest.mark.parametrize("other", [7, "x", object], ids=str)
@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_of_another_kind_is_named_before_a_model_is_loaded(tmp_path, name, other):
    content = {"state_dict": {}, "global_step": 1} | {name: {3: [other]} if other is object else other}
    if ENTRIES[name][0](content[name]) or other is object:
        content[name] = [7]
    if name == "state_dict":
        content[name] = {"a": "x"}
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError) as error:
        read_checkpoint(tmp_path / "other.ckpt")
    assert f"is damaged: its entry {name!r} must be" in str(error.value)


NEEDED = [
    ("global_step",), ("pytorch-lightning_version",), ("loops",), ("loops", "fit_loop"),
    ("loops", "fit_loop", "epoch_progress"), ("optimizer_states",), ("optimizer_states", 0), ("callbacks", "Rollout"),
    ("callbacks", "Rollout", "ranks"), ("callbacks", "Rollout", "ranks", 0, "counter"),
    ("callbacks", "Rollout", "ranks", 0, "plan"), ("callbacks", "Rollout", "ranks", 0, "experience", "rollout"),
    ("callbacks", "ExactResume", "identity"), ("callbacks", "ExactResume", "configured"),
    ("callbacks", "ExactResume", "options"), ("callbacks", "ExactResume", "rows"),
]  # fmt: skip


@pytest.mark.parametrize("place", NEEDED, ids=lambda place: ".".join(map(str, place)))
def test_what_a_run_needs_is_missing_or_of_another_kind(saved, tmp_path, place):
    for other in (3.5, "x", ...):
        with pytest.raises(UserError) as error:
            go(tmp_path, changed(saved, place, other, tmp_path), 4)
        assert "\n" not in str(error.value)
        assert "other.ckpt" in str(error.value)


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("weight", [torch.zeros(3), "x", None])
def test_weights_that_do_not_fit(saved, tmp_path, stage, weight):
    with pytest.raises(UserError) as error:
        go(tmp_path, changed(saved, ("state_dict", WEIGHT), weight, tmp_path), 4, stage)
    assert "\n" not in str(error.value)
    assert "other.ckpt" in str(error.value)


def test_whole_numbers_are_no_weights(saved, tmp_path):
    path = changed(saved, ("state_dict", WEIGHT), saved["state_dict"][WEIGHT].long(), tmp_path)
    policy = make_policy(checkpoint=str(path))
    with pytest.raises(UserError, match=r"is of torch.int64, the policy's of torch.float32"):
        policy.build(device=torch.device("cpu"), reference=False)
