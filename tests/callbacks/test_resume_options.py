"""Options of the configuration win over those of a checkpoint, and each change is reported."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import ExactResume
from lightning_mpo.errors import UserError
from tests.support.runs import Probe, adam, fit, sgd


def test_the_configuration_wins_over_the_checkpoint_and_says_so(tmp_path, caplog):
    def run(folder, lr, steps, ckpt_path=None, seed=1):
        return fit(
            folder,
            rollout={"seed": seed},
            module={
                "optimizer": sgd(lr),
                "scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(
                    optimizer, 0.5, 1.0, 10 + steps
                ),
            },
            callbacks=[ExactResume(), ModelCheckpoint(folder, save_last=True)],
            max_steps=steps,
            ckpt_path=ckpt_path,
        )

    run(tmp_path, 0.05, 2)
    with caplog.at_level("INFO"):
        resumed = run(tmp_path, 0.1, 3, f"{tmp_path}/last.ckpt", seed=2)
    group = resumed.trainer.optimizers[0].param_groups[0]
    scheduler = resumed.trainer.lr_scheduler_configs[0].scheduler
    assert group["initial_lr"] == 0.1
    assert 0.05 < group["lr"] < 0.1
    assert scheduler.total_iters == 13
    for said in (
        "lr was 0.025 and is 0.05",
        "scheduler total_iters was 12 and is 13",
        "rollout.seed was 1 and is 2",
    ):
        assert f"{said}: the configuration wins" in caplog.text.replace("optimizer ", ""), said


def test_the_configuration_wins_within_schedules_of_schedules(tmp_path, caplog):
    def run(period, steps, ckpt_path=None):
        def schedule(optimizer):
            warm = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 1)
            rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, period)
            return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], [1])

        save = ModelCheckpoint(tmp_path, save_last=True)
        module = {"optimizer": sgd(0.1), "scheduler": schedule}
        return fit(
            tmp_path, module=module, callbacks=[ExactResume(), save], max_steps=steps, ckpt_path=ckpt_path,
        )  # fmt: skip

    run(10, 2)
    with caplog.at_level("INFO"):
        resumed = run(100, 3, f"{tmp_path}/last.ckpt")
    assert resumed.trainer.lr_scheduler_configs[0].scheduler._schedulers[1].T_max == 100
    assert "scheduler T_max was 10 and is 100: the configuration wins" in caplog.text


@pytest.mark.parametrize("change", ["optimizer", "scheduler"])
def test_another_optimiser_or_schedule_is_refused_before_its_state_is_read(tmp_path, change):
    constant = torch.optim.lr_scheduler.ConstantLR
    module = {"optimizer": adam(1e-3), "scheduler": constant}
    fit(
        tmp_path,
        module=module,
        callbacks=[ExactResume(), ModelCheckpoint(tmp_path, save_last=True)],
        max_steps=1,
    )
    other = {
        "optimizer": sgd(1e-3),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    }
    said = {
        "optimizer": "the optimiser AdamW? of 1 groups, and the configuration has SGD of 1 groups",
        "scheduler": "the schedule ConstantLR, and the configuration has ExponentialLR",
    }[change]
    never = Probe(on_train_start=lambda *_: pytest.fail("began"))
    with pytest.raises(
        UserError, match=f"{said}: a run goes on as it began; .* give `policy.checkpoint`"
    ):
        fit(
            tmp_path, module=module | {change: other[change]}, callbacks=[ExactResume(), never], max_steps=2,
            ckpt_path=f"{tmp_path}/last.ckpt", enable_checkpointing=False,
        )  # fmt: skip


def test_nothing_is_said_where_nothing_has_changed(tmp_path, caplog):
    callbacks = [ExactResume(), ModelCheckpoint(tmp_path, save_last=True)]
    fit(tmp_path, callbacks=callbacks, max_steps=1)
    with caplog.at_level("INFO"):
        fit(tmp_path, callbacks=callbacks, max_steps=2, ckpt_path=f"{tmp_path}/last.ckpt")
    assert "the configuration wins" not in caplog.text


@pytest.mark.filterwarnings("error:the checkpoint was saved in the middle")
@pytest.mark.parametrize("kind", [True, "link", False])
def test_the_end_of_a_run_is_saved_as_last(tmp_path, kind):
    def end(steps, path=None):
        save = ModelCheckpoint(
            tmp_path, "{step}", save_last=kind, every_n_train_steps=2, enable_version_counter=False
        )
        return fit(tmp_path, callbacks=[ExactResume(), save], max_steps=steps, ckpt_path=path)

    last = tmp_path / "last.ckpt"
    run = end(3)
    assert last.exists() == bool(kind)
    if kind:
        found = torch.load(last, weights_only=True)
        assert found["global_step"] == 3
        weights = run.module.state_dict()
        assert found["state_dict"]
        assert all(torch.equal(value, weights[name]) for name, value in found["state_dict"].items())
        end(5, str(last))
        assert torch.load(last, weights_only=True)["global_step"] == 5, "of a run that went on, too"
    names = {path.name for path in tmp_path.glob("step*.ckpt")}
    assert names <= {"step=2.ckpt", "step=4.ckpt"}


def test_a_save_within_an_update_is_named_when_the_run_goes_on(tmp_path):
    def save(trainer, module, outputs, batch, batch_idx):
        if batch_idx == 5:
            trainer.save_checkpoint(tmp_path / "within.ckpt")

    shared = {"accumulate_grad_batches": 4, "max_steps": 3}
    fit(tmp_path, callbacks=[ExactResume(), Probe(on_train_batch_end=save)], **shared)
    with pytest.warns(UserWarning, match="saved in the middle of an update"):
        fit(tmp_path, callbacks=[ExactResume()], ckpt_path=f"{tmp_path}/within.ckpt", **shared)
