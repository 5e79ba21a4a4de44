"""A killed run ends as if it had not been killed: what Lightning leaves out of checkpoints is there again."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_mpo.callbacks import (
    ExactResume,
    KLTracking,
    PromptOrder,
    Samples,
    SupportOverlap,
    Watchdog,
)
from lightning_mpo.objective.kl import AdaptiveCoefficient, KLPenalty
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies import CausalPolicy, Lora
from lightning_mpo.resume.comparison import compare, compare_runs
from lightning_mpo.resume.metrics_csv import MetricsCSV
from tests.support.runs import Probe, Run, adam, fit, make_objective, same

STEPS = 8


def train(
    folder: Path, source: str, *, ckpt_path: str | None = None, callbacks=(), save=None, **options
) -> Run:
    """Three rollouts of two updates make an epoch; a validation every third update; dropout, so that chance matters."""
    torch.manual_seed(3 if ckpt_path is None else 4)
    often = {
        "save_last": True,
        "every_n_train_steps": 1,
        "save_top_k": -1,
        "enable_version_counter": False,
    }
    save = save or ModelCheckpoint(folder / "checkpoints", "{step}", **often)
    return fit(
        folder,
        **{
            "policy": CausalPolicy(source, lora=Lora(rank=2, alpha=4, dropout=0.2)),
            "objective": make_objective(
                support=TopK(6), terms=[KLPenalty(AdaptiveCoefficient(0.01, horizon=16))]
            ),
            "rollout": {"minibatches": 2},
            "module": {
                "optimizer": adam(3e-3),
                "scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(
                    optimizer, 1.0, 0.1, STEPS
                ),
            },
            "callbacks": [
                KLTracking(),
                Watchdog(),
                Samples(every=1, show=False),
                SupportOverlap(every=2, rows=4),
                PromptOrder(),
                ExactResume(),
                *callbacks,
                save,
            ],
            "logger": MetricsCSV(folder, name="", version=""),
            "max_steps": STEPS,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 1,
            "ckpt_path": ckpt_path,
        }
        | options,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder) -> Path:
    """An undisturbed run that saved after each update."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, tiny_folder)
    return folder


@pytest.fixture
def interrupted(whole, tmp_path) -> Path:
    """Its folder, as a killed run may leave it: with more than the checkpoint knows of."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "at", [3, 5, 6, 8], ids=["validation due", "within an epoch", "epoch end", "last update"]
)
def test_everything_is_as_in_an_undisturbed_run(whole, interrupted, tiny_folder, at):
    train(interrupted, tiny_folder, ckpt_path=f"{interrupted}/checkpoints/step={at}.ckpt")
    found = compare_runs(whole, interrupted)
    assert [part.difference for part in found if part.difference] == []
    counts = {part.part: part.count for part in found}
    assert all(counts[part] > 0 for part in counts), counts
    assert (interrupted / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    samples = "completions/rollouts.jsonl"
    assert (interrupted / samples).read_bytes() == (whole / samples).read_bytes()


class PowerCutError(Exception):
    pass


def test_a_validation_that_is_made_up_for_is_not_made_twice(whole, tmp_path, tiny_folder):
    """The run dies right behind it, with a checkpoint that it wrote itself."""

    def save(trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(tmp_path / "before.ckpt")

    def die(*_):
        raise PowerCutError

    at_validation = ModelCheckpoint(
        tmp_path / "checkpoints", save_last=True, enable_version_counter=False
    )
    probe = Probe(on_train_batch_end=save, on_validation_start=die)
    with pytest.raises(PowerCutError):
        train(tmp_path, tiny_folder, callbacks=[probe], save=at_validation)
    probe = Probe(on_train_batch_start=die)
    with pytest.raises(PowerCutError):
        train(
            tmp_path,
            tiny_folder,
            ckpt_path=f"{tmp_path}/before.ckpt",
            callbacks=[probe],
            save=at_validation,
        )
    last = f"{tmp_path}/checkpoints/last.ckpt"
    train(tmp_path, tiny_folder, ckpt_path=last)
    assert (tmp_path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert [part.difference for part in compare_runs(whole, tmp_path) if part.difference] == []


def test_the_comparison_sees_what_differs(whole, interrupted, tiny_folder):
    def disturb(trainer, module):
        torch.manual_seed(99)

    path = f"{interrupted}/checkpoints/step=5.ckpt"
    train(interrupted, tiny_folder, ckpt_path=path, callbacks=[Probe(on_train_epoch_end=disturb)])
    differ = [part.part for part in compare_runs(whole, interrupted) if part.difference]
    assert {"weights", "optimiser", "random numbers", "metrics.csv"} <= set(differ)
    found = compare("part", {"a": [1, torch.ones(3)]}, {"a": [1, torch.tensor([1.0, 2.0, 1.0])]})
    assert found.difference == "part[a][1]: 1 of 3 values, the first 1.0 and 2.0"
    assert compare("part", {"a": float("nan")}, {"a": float("nan")}).difference is None
    assert compare("part", {}, {"a": 1}).difference == "part[a]: nothing and 1"


@pytest.mark.filterwarnings("ignore:stopping")
def test_a_run_that_was_stopped_for_its_divergence_stays_stopped(tmp_path):
    """Killed behind its last save, while it evaluates, say."""

    def run(steps=12, ckpt_path=None, bound=1e-3):
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [KLTracking(stop_above=bound), ExactResume(), save]
        return fit(
            tmp_path, callbacks=callbacks, module={"optimizer": adam(2e-2)}, max_steps=steps, ckpt_path=ckpt_path,
        )  # fmt: skip

    whole = run()
    last = whole.trainer.global_step
    assert 1 < last < 12
    resumed = run(ckpt_path=f"{tmp_path}/step={last}.ckpt")
    assert resumed.trainer.global_step == last
    assert same(resumed.weights, whole.weights)
    again = run(ckpt_path=f"{tmp_path}/step={last - 1}.ckpt")
    assert again.trainer.global_step == last
    assert run(last + 1, f"{tmp_path}/step={last}.ckpt", bound=10.0).trainer.global_step == last + 1


def test_a_run_that_early_stopping_ended_stays_ended(tmp_path, caplog):
    """Killed behind the save of its last validation. Another `patience` goes on where it was."""

    def run(ckpt_path=None, patience=2):
        stop = EarlyStopping("val/reward", min_delta=99.0, patience=patience, mode="max")
        save = ModelCheckpoint(tmp_path, "{step}", "val/reward", mode="max", save_top_k=-1)
        return fit(
            tmp_path, callbacks=[stop, ExactResume(), save], max_steps=8, val_check_interval=1, limit_val_batches=1,
            check_val_every_n_epoch=None, ckpt_path=ckpt_path,
        )  # fmt: skip

    whole = run()
    assert whole.trainer.global_step == 3, "no validation was better than the first"
    with caplog.at_level("INFO"):
        resumed = run(f"{tmp_path}/step=3.ckpt")
    assert "EarlyStopping on 'val/reward' has ended this run" in caplog.text
    assert resumed.trainer.global_step == 3
    assert same(resumed.weights, whole.weights)
    again = run(f"{tmp_path}/step=2.ckpt")
    assert same(again.weights, whole.weights)
    assert run(f"{tmp_path}/step=3.ckpt", patience=4).trainer.global_step == 5


def test_a_save_that_the_clock_asks_for_waits_for_the_end_of_the_update(tmp_path):
    saved: list[int] = []
    watch = Probe(
        on_save_checkpoint=lambda trainer, *_: saved.append(trainer.fit_loop.epoch_loop.batch_idx)
    )
    save = ModelCheckpoint(tmp_path, "{step}", train_time_interval=timedelta(0), save_top_k=-1)
    shared = {"accumulate_grad_batches": 4, "max_steps": 4}
    whole = fit(tmp_path, callbacks=[ExactResume(), watch, save], **shared)
    assert saved[:4] == [3, 7, 11, 3]
    resumed = fit(
        tmp_path, callbacks=[ExactResume()], ckpt_path=f"{tmp_path}/step=2.ckpt", **shared
    )
    assert same(resumed.weights, whole.weights)


@pytest.mark.filterwarnings("error:the checkpoint was saved in the middle")
def test_a_resumed_run_saves_at_the_ends_of_updates_only(tmp_path):
    """Lightning forgets which step is saved, and would save it again at the first micro-batch."""
    saved: list[tuple[int, int]] = []
    watch = Probe(
        on_save_checkpoint=lambda trainer, *_: saved.append(
            (trainer.global_step, trainer.fit_loop.epoch_loop.batch_idx)
        )
    )

    def run(folder, steps, ckpt_path=None):
        save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        return fit(
            folder, callbacks=[ExactResume(), watch, save], accumulate_grad_batches=2, max_steps=steps, ckpt_path=ckpt_path,
        )  # fmt: skip

    whole = run(tmp_path / "whole", 3)
    undisturbed = list(saved)
    run(tmp_path, 1)
    saved.clear()
    resumed = run(tmp_path, 3, f"{tmp_path}/step=1.ckpt")
    assert saved == [at for at in undisturbed if at[0] > 1] == [(2, 3), (3, 5)]
    assert same(resumed.weights, whole.weights)


def test_where_the_numbers_lie_is_the_same_after_a_resume(whole, tmp_path, tiny_folder):
    """Matrix libraries round differently where memory is aligned otherwise; strides and offsets are part of it."""

    def lie(trainer, module, batch, batch_idx):
        if trainer.global_step != 5 or places:
            return
        source, optimizer = module.source, trainer.optimizers[0]
        experience = source.experience
        tensors = {f"weights {n}": w for n, w in module.policy.named_parameters()}
        tensors |= {
            f"rollout {n}": t
            for n, t in vars(experience.rollout).items()
            if isinstance(t, torch.Tensor)
        }
        tensors |= {
            f"experience {n}": t for n, t in vars(experience).items() if isinstance(t, torch.Tensor)
        }
        for i, state in enumerate(optimizer.state.values()):
            tensors |= {f"optimiser {i} {n}": t for n, t in state.items()}
        places.update(
            {
                n: (t.data_ptr() % 64, t.stride(), t.storage_offset(), t.dtype)
                for n, t in tensors.items()
            }
        )

    places: dict[str, object] = {}
    train(tmp_path / "again", tiny_folder, callbacks=[Probe(on_train_batch_start=lie)], max_steps=6)
    expected, places = dict(places), {}
    train(tmp_path, tiny_folder, ckpt_path=f"{whole}/checkpoints/step=5.ckpt", callbacks=[Probe(on_train_batch_start=lie)],
          max_steps=6)  # fmt: skip
    assert len(places) > 40
    assert places == expected
