"""Answers to held-out problems: files, gains over step 0, and tables of the verbs."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import HeldOutAnswers, RolloutLoop
from lightning_mpo.errors import UserError
from lightning_mpo.functional.evaluation import paired_difference
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.rollout.answer_file import read_answers
from tests.support.runs import (
    Digits,
    adam,
    fit,
    make_data,
    make_objective,
    make_policy,
    make_trainer,
)


class Low(Digits):
    """Right with a digit below 5 at the beginning."""

    is_accuracy = True

    def score(self, completions):
        return [float(done.text[:1] in ("0", "1", "2", "3", "4")) for done in completions]


OPTIONS = {"rewards": [Low()], "validation_completions": 2, "validation_ks": [1, 2]}
VALIDATED = {
    "limit_val_batches": 1.0,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": -1,
}


def train(folder, steps=4, callbacks=(), **more):
    return fit(
        folder,
        callbacks=[HeldOutAnswers(), *callbacks],
        rollout=OPTIONS,
        module={"optimizer": adam(0.05)},
        max_steps=steps,
        data=make_data(validation_batch_size=3),
        **VALIDATED,
        **more,
    )


def test_gains_are_paired_with_step_0_also_after_a_resume(tmp_path):
    save = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=2)
    stale = tmp_path / "held_out" / "step-000099.jsonl"
    stale.parent.mkdir()
    stale.write_text("of an earlier run")
    first = train(tmp_path, 2, [save])
    last = train(tmp_path, 4, ckpt_path=f"{tmp_path}/last.ckpt")
    names = sorted(path.name for path in stale.parent.iterdir())
    assert names == ["step-000000.jsonl", "step-000002.jsonl", "step-000004.jsonl"]
    rates = {}
    for name in names:
        about, problems = read_answers(stale.parent / name)
        assert about["problems"] == len(problems) == 4
        rates[about["step"]] = [
            sum(sample["right"] for sample in part["samples"]) / 2 for part in problems
        ]
    for run, step in ((first, 2), (last, 4)):
        pair = (torch.tensor(rates[0]), torch.tensor(rates[step]))
        expected = paired_difference(*pair).tolist()
        logged = [
            run.record.column(f"val/pass_at_1_{name}")[-1]
            for name in ("gain", "gain_low", "gain_high")
        ]
        assert logged == pytest.approx(expected, abs=1e-6)
    assert rates[0] != rates[4], "nothing was learned: the test shows nothing"
    assert first.record.column("val/pass_at_2")


def verb(folder, name, columns=None, objective=None):
    loop = RolloutLoop(max_new_tokens=8, seed=1, **OPTIONS)
    machine = make_trainer(
        folder, [loop, HeldOutAnswers(columns)], limit_val_batches=1.0, limit_test_batches=1.0
    )
    module = PolicyOptimization(make_policy(), objective or make_objective())
    return getattr(machine, name)(module, datamodule=make_data(validation_batch_size=3))


def test_validate_prints_the_difference_from_step_0(tmp_path, capsys):
    train(tmp_path, 2)
    capsys.readouterr()
    (result,) = verb(tmp_path, "validate")
    printed = capsys.readouterr().out
    assert "Arithmetic, 4 problems, 95 % intervals" in printed
    assert "step 0, 4 problems, paired" in printed
    _, problems = read_answers(tmp_path / "held_out" / "validate.jsonl")
    _, before = read_answers(tmp_path / "held_out" / "step-000000.jsonl")
    assert problems == before, "the same weights, problems and seeds"
    rate = sum(sample["right"] for part in problems for sample in part["samples"]) / 8
    assert result["val/pass_at_1"] == pytest.approx(rate)


def test_a_table_needs_its_column(tmp_path):
    with pytest.raises(UserError, match="no problem has a column 'level'"):
        verb(tmp_path, "test", ["level"])
