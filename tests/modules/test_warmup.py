"""The supervised stage: the loss is of solutions alone, it learns them, and its checkpoint starts the next stage."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.errors import UserError
from lightning_mpo.modules import SupervisedWarmup
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.types import PromptRow
from tests.support.runs import Probe, Record, adam, fit, make_data, make_policy, make_trainer, same


def warm_up(
    folder,
    steps,
    *,
    ckpt_path=None,
    callbacks=(),
    data=None,
    policy=None,
    batches=3,
    lr=1e-2,
    **trainer,
):
    record = Record()
    module = SupervisedWarmup(
        policy or make_policy(), batch_size=4, batches_per_epoch=batches, optimizer=adam(lr)
    )
    machine = make_trainer(folder, callbacks, logger=record, max_steps=steps, **trainer)
    machine.fit(module, datamodule=data or make_data(), ckpt_path=ckpt_path)
    return module, record


def test_the_loss_is_the_mean_over_solution_tokens_of_their_negative_log_prob(tmp_path):
    data, policy = make_data(digits=2), make_policy()
    _, record = warm_up(tmp_path, 1, data=data, policy=policy, lr=0.0)
    tokenizer, total, count = policy.tokenizer, 0.0, 0
    for row in data.training_rows(0, 4):
        prompt = tokenizer(row.prompt)["input_ids"]
        answer = [*tokenizer(row.solution)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = policy.network(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        for i, token in enumerate(answer):
            total -= logits[len(prompt) + i - 1, token].item()
            count += 1
    assert record.column("loss")[0] == pytest.approx(total / count, rel=1e-5)


def test_it_learns_to_imitate(tmp_path):
    _, record = warm_up(tmp_path, 60)
    losses = record.column("loss")
    assert sum(losses[-3:]) < 0.3 * sum(losses[:3])


@pytest.mark.parametrize(
    ("at", "batches", "cuts"), [(2, 3, 1), (3, 3, 1), (4, 3, 1), (2, 4, 2), (3, 4, 2)]
)
def test_prompts_go_on_where_they_stopped(tmp_path, at, batches, cuts):
    """Over epochs, and after a resume: at 3 of 3, and at 2 with 2 micro-batches of 4, the epoch is at its end."""
    asked = []

    def spied():
        data = make_data()
        rows = data.training_rows

        def spy(counter, count, round=0):
            asked.append((counter, count))
            return rows(counter, count, round)

        data.training_rows = spy
        return data

    options = {"batches": batches, "accumulate_grad_batches": cuts}
    whole, _ = warm_up(tmp_path / "whole", 7, data=spied(), **options)
    assert asked == [(counter, 4) for counter in range(7 * cuts)]
    asked.clear()
    warm_up(
        tmp_path,
        at,
        callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)],
        data=spied(),
        **options,
    )
    resumed, _ = warm_up(tmp_path, 7, ckpt_path=f"{tmp_path}/last.ckpt", data=spied(), **options)
    assert asked == [(counter, 4) for counter in range(7 * cuts)]
    assert same(dict(resumed.policy.named_parameters()), dict(whole.policy.named_parameters()))


def test_its_checkpoint_starts_the_reinforcement_stage(tmp_path):
    module, _ = warm_up(tmp_path, 3, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)])
    seen = []
    probe = Probe(
        on_train_start=lambda trainer, other: seen.append(
            {name: weight.detach().clone() for name, weight in other.policy.named_parameters()}
        )
    )
    fit(
        tmp_path,
        policy=make_policy(checkpoint=f"{tmp_path}/last.ckpt"),
        callbacks=[probe],
        max_steps=1,
    )
    assert same(
        seen[0], {name: weight.detach() for name, weight in module.policy.named_parameters()}
    )
    assert not same(seen[0], fit(tmp_path, max_steps=1, module={"optimizer": adam(0.0)}).weights)


def test_validation_reports_the_loss_on_held_out_solutions(tmp_path):
    data, policy = make_data(), make_policy()
    module, record = warm_up(tmp_path, 3, data=data, policy=policy, lr=0.0, limit_val_batches=1.0)
    with torch.no_grad():
        expected = module._loss(list(data.splits.validation)).item()
    assert record.column("val/loss") == [pytest.approx(expected, rel=1e-5)]


def test_rows_without_a_solution_are_refused(tmp_path):
    data = make_data()
    data.training_rows = lambda counter, count, round=0: [PromptRow("1+1=", "2")] * count
    with pytest.raises(UserError, match="has no solution to imitate"):
        warm_up(tmp_path, 1, data=data)


def test_other_data_modules_are_refused(tmp_path):
    import lightning as L

    with pytest.raises(UserError, match="PromptDataModule"):
        warm_up(tmp_path, 1, data=L.LightningDataModule())


def test_rows_that_the_model_has_no_positions_for_are_refused_at_set_up(tmp_path):
    policy = TinyPolicy("0123456789+-*=;, ", max_length=5)
    policy.load_network = lambda: pytest.fail("loaded")
    with pytest.raises(UserError, match="and its solution .* more than the model's 5 positions"):
        warm_up(tmp_path, 1, policy=policy, data=make_data(digits=2))
