"""Checkpoints with entries of another kind: one line each, on the way to `fit` and to `validate`."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import ExactResume, RolloutLoop
from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.resume.checkpoints import find_checkpoint
from lightning_mpo.resume.entries import check_weights
from lightning_mpo.resume.optimizer_states import check_optimizer, complete_options, describe_state
from lightning_mpo.storage import read_checkpoint
from lightning_mpo.storage.reading import ENTRIES
from tests.support.runs import Digits, adam, make_data, make_objective, make_policy

WEIGHT = "policy.network.model.embed_tokens.weight"


def go(folder: Path, path: Path | None, steps: int, stage: str = "fit") -> None:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        max_steps=steps, num_sanity_val_steps=0, limit_val_batches=1, accumulate_grad_batches=2,
        val_check_interval=1000, check_val_every_n_epoch=None, default_root_dir=folder,
        callbacks=[
            RolloutLoop([Digits()], prompts=4, completions=2, minibatches=2, max_new_tokens=5),
            ExactResume(),
            ModelCheckpoint(dirpath=folder / "c", save_last=True, every_n_train_steps=1),
        ],
    )  # fmt: skip
    module = PolicyOptimization(make_policy(), make_objective(), optimizer=adam())
    if path is not None:
        find_checkpoint(trainer, module, str(path), stage=stage)
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
    content = {"state_dict": {}, "global_step": 1} | {
        name: {3: [other]} if other is object else other
    }
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
    ("loops", "fit_loop", "epoch_progress"), ("optimizer_states",), ("optimizer_states", 0), ("callbacks", "RolloutLoop"),
    ("callbacks", "RolloutLoop", "ranks"), ("callbacks", "RolloutLoop", "ranks", 0, "counter"),
    ("callbacks", "RolloutLoop", "ranks", 0, "plan"), ("callbacks", "RolloutLoop", "ranks", 0, "experience", "rollout"),
    ("callbacks", "ExactResume", "identity"), ("callbacks", "ExactResume", "configured"),
    ("callbacks", "ExactResume", "options"), ("callbacks", "ExactResume", "rows"),
    ("callbacks", "ExactResume", "configured", "kinds"), ("callbacks", "ExactResume", "identity", "model"),
    ("callbacks", "ExactResume", "configured", "groups"),
    ("callbacks", "RolloutLoop", "ranks", 0, "experience"), ("callbacks", "RolloutLoop", "ranks", 0, "experience", "valid_B"),
    ("loops", "fit_loop", "epoch_progress", "current", "processed"),
    ("loops", "fit_loop", "epoch_loop.batch_progress", "is_last_batch"),
    ("loops", "fit_loop", "epoch_loop.val_loop.batch_progress", "total"),
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


def refused(saved: dict, place: tuple, other: object, tmp_path: Path, stage: str = "fit") -> str:
    with pytest.raises(UserError) as error:
        go(tmp_path, changed(saved, place, other, tmp_path), 4, stage)
    assert "\n" not in str(error.value)
    assert "other.ckpt" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_missing_weight_is_named(saved, tmp_path, stage):
    for name in list(saved["state_dict"])[1::5]:
        said = refused(saved, ("state_dict", name), ..., tmp_path, stage)
        assert f"no weight {name.removeprefix('policy.')!r}" in said


def test_whole_numbers_for_a_weight_are_refused_on_resume(saved, tmp_path):
    weight = saved["state_dict"][WEIGHT].long()
    assert "is of torch.int64" in refused(saved, ("state_dict", WEIGHT), weight, tmp_path)


def test_a_tied_weight_may_be_there_under_one_name():
    weight = torch.nn.Parameter(torch.zeros(2))
    policy = torch.nn.Module()
    policy.one = policy.two = weight
    policy.trained_state = lambda state: state
    module = torch.nn.Module()
    module.policy = policy
    check_weights(module, {"state_dict": {"policy.two": weight}}, "fit")
    with pytest.raises(ValueError, match="no weight 'one'"):
        check_weights(module, {"state_dict": {}}, "fit")


MOMENTS = [
    (("state", 5), ...), (("state", 5), {}), (("state", 5), None), (("state",), {}), (("state",), [1]),
    (("state", 5, "exp_avg"), ...), (("state", 5, "exp_avg"), 3), (("state", 5, "exp_avg"), {"a": 1}),
    (("state", 5, "exp_avg"), torch.zeros(3)), (("state", 5, "exp_avg"), torch.zeros(3).long()),
    (("state", 5, "step"), "x"), (("state", 5, "step"), ...), (("state", 5, "other"), 1), (("state", 77), {"step": 1}),
    (("param_groups", 0, "weight_decay"), [1]), (("param_groups", 0, "lr"), -7), (("param_groups", 0, "lr"), None),
    (("param_groups", 0, "lr"), float("nan")), (("param_groups", 0, "betas"), "x"),
    (("param_groups", 0, "betas"), [0.9]), (("param_groups", 0, "fused"), -7), (("param_groups", 0, "amsgrad"), 1),
    (("param_groups", 0, "lr"), ...), (("param_groups", 0, "eps"), ...),
    (("param_groups", 0, "params"), [0]), (("param_groups", 0), {}), (("param_groups",), []),
]  # fmt: skip


@pytest.mark.parametrize(("place", "other"), MOMENTS, ids=str)
def test_the_state_of_the_optimiser_is_that_of_the_save(saved, tmp_path, place, other):
    refused(saved, ("optimizer_states", 0, *place), other, tmp_path)


def test_weights_without_a_step_have_no_state():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights)
    weights[0].grad = torch.ones(2)
    optimizer.step()
    described, saved = describe_state(optimizer), optimizer.state_dict()
    assert described == {
        0: {"step": "float32 []", "exp_avg": "float32 [2]", "exp_avg_sq": "float32 [2]"}
    }
    names = {id(weights[0]): "a", id(weights[1]): "b"}
    check_optimizer(optimizer, saved, described, names)
    saved["state"][1] = saved["state"].pop(0)
    with pytest.raises(ValueError, match="'step' of 'a' was float32 .* and is not there"):
        check_optimizer(optimizer, saved, described, names)
    check_optimizer(optimizer, saved, None, names)  # other writers note nothing


def test_an_option_that_the_class_fills_in_is_the_run_s():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], maximize=True)
    before, saved = [dict(group) for group in optimizer.param_groups], optimizer.state_dict()
    del saved["param_groups"][0]["maximize"]
    optimizer.load_state_dict(saved)
    complete_options(optimizer, before, saved["param_groups"])
    assert optimizer.param_groups[0]["maximize"] is True
    del saved["param_groups"][0]["eps"]
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="no option 'eps'"):
        complete_options(optimizer, before, saved["param_groups"])


COUNTS = ["x", None, -7, True, 2.0, {}]


@pytest.mark.parametrize("other", COUNTS, ids=str)
def test_counters_of_loops_are_counts(saved, tmp_path, other):
    place = ("loops", "fit_loop", "epoch_loop.batch_progress", "total", "ready")
    assert f"`{'.'.join(place)}` must be a whole number" in refused(saved, place, other, tmp_path)


def test_the_update_is_that_of_the_loops(saved, tmp_path):
    assert "its loops have counted 3 updates" in refused(saved, ("global_step",), 2, tmp_path)


@pytest.mark.parametrize("other", [None, {}, [], "x"], ids=str)
@pytest.mark.parametrize("callback", ["ExactResume", "RolloutLoop", "ModelCheckpoint"])
def test_states_of_callbacks_are_not_empty(saved, tmp_path, callback, other):
    key = next(key for key in saved["callbacks"] if key.startswith(callback))
    refused(saved, ("callbacks", key), other, tmp_path)


@pytest.mark.parametrize("other", [None, -7, [1], ...], ids=str)
@pytest.mark.parametrize(
    "name", ["best_model_path", "last_model_path", "kth_best_model_path", "best_k_models"]
)
def test_paths_of_saves_are_texts(saved, tmp_path, name, other):
    key = next(key for key in saved["callbacks"] if key.startswith("ModelCheckpoint"))
    assert name in refused(saved, ("callbacks", key, name), other, tmp_path)


@pytest.mark.parametrize("name", ["identity", "options", "configured"])
def test_what_a_run_was_is_not_empty(saved, tmp_path, name):
    refused(saved, ("callbacks", "ExactResume", name), {}, tmp_path)


@pytest.mark.parametrize(
    "other", [{}, None, 3, torch.ones(2, dtype=torch.bool), torch.ones(8)], ids=str
)
def test_fields_of_a_rollout_are_of_their_kind(saved, tmp_path, other):
    refused(
        saved, ("callbacks", "RolloutLoop", "ranks", 0, "experience", "valid_B"), other, tmp_path
    )


@pytest.mark.parametrize("other", [None, "x", {}, torch.ones(2)], ids=str)
@pytest.mark.parametrize("name", ["repeated", "metrics", "row"])
def test_logged_values_are_numbers(saved, tmp_path, name, other):
    refused(saved, ("callbacks", "ExactResume", name), {"reward/mean": other}, tmp_path)


def test_the_state_of_a_callback_that_saved_is_there(saved, tmp_path):
    key = next(key for key in saved["callbacks"] if key.startswith("ModelCheckpoint"))
    refused(saved, ("callbacks", key), ..., tmp_path)
    refused(saved, ("callbacks", "ExactResume", "saved", key), {}, tmp_path)


def test_a_rollout_that_was_made_is_counted(saved, tmp_path):
    refused(saved, ("callbacks", "RolloutLoop", "ranks", 0, "counter"), -7, tmp_path)
