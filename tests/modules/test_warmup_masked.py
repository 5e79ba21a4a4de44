"""The supervised stage of a masked policy: its loss, validation, resume and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.errors import UserError
from lightning_mpo.modules import MaskedTokens, SupervisedWarmup
from lightning_mpo.policies import TinyMaskedPolicy
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptRow
from tests.support.runs import Record, adam, make_data, make_policy, make_trainer, same

STAGE = 12
"""Canvas: a solution of one digit has up to 11 tokens, and an end token."""


def masked(**options):
    return make_policy(TinyMaskedPolicy, **options)


def warm_up(folder, steps, *, policy=None, data=None, likelihood=..., lr=1e-2, **options):
    """Train a masked policy on demonstrations, 4 rows a step."""
    record, data = Record(), data or make_data()
    likelihood = MaskedTokens(STAGE) if likelihood is ... else likelihood
    module = SupervisedWarmup(
        policy or masked(),
        batch_size=4,
        batches_per_epoch=3,
        optimizer=adam(lr),
        likelihood=likelihood,
    )
    callbacks, ckpt_path = options.pop("callbacks", ()), options.pop("ckpt_path", None)
    machine = make_trainer(folder, callbacks, logger=record, max_steps=steps, **options)
    machine.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, record


@torch.no_grad()
def naive_loss(policy, data, rows, numbers_BX, least=1e-3) -> float:
    """Return the loss by a loop over rows, tokens and the logits of the network."""
    tokenizer, total = policy.tokenizer, 0.0
    for row, numbers_X in zip(rows, numbers_BX.tolist(), strict=True):
        prompt = tokenizer(row.prompt)["input_ids"]
        answer = tokenizer(row.solution)["input_ids"]
        answer = answer + [tokenizer.eos_token_id] * (STAGE - len(answer))
        p = (1 - least) * numbers_X[0] + least
        hidden = [u < p for u in numbers_X[1:]]
        seen = [
            policy.mask_id if gone else token for token, gone in zip(answer, hidden, strict=True)
        ]
        logits_LV = policy.network(torch.tensor([prompt + seen])).logits[0].double()
        logits_LV[:, list(policy.barred)] = -torch.inf
        table_LV = logits_LV.log_softmax(-1)
        for i, token in enumerate(answer):
            if hidden[i]:
                total -= table_LV[len(prompt) + i, token].item() / p
    return total / (len(rows) * STAGE)


def test_the_loss_is_the_weighted_cross_entropy_of_hidden_tokens(tmp_path):
    data, policy = make_data(), masked()
    _, record = warm_up(tmp_path, 2, data=data, policy=policy, lr=0.0)
    for position in (0, 1):
        rows = data.training_rows(position, 4)
        generator = generator_of(0, Stream.DEMONSTRATE, position)
        numbers_BX = MaskedTokens(STAGE).numbers(4, generator)
        expected = naive_loss(policy, data, rows, numbers_BX)
        assert record.column("loss")[position] == pytest.approx(expected, rel=1e-4)


def test_it_learns_demonstrations(tmp_path):
    policy = TinyMaskedPolicy(hidden_size=32, layers=2, heads=2)
    _, record = warm_up(tmp_path, 150, policy=policy, lr=3e-3, limit_val_batches=1.0)
    losses = record.column("val/loss")
    assert losses[-1] < 0.7 * losses[0]


def test_validations_of_the_same_weights_are_equal(tmp_path):
    """Noise of validation depends on the batch alone, and is none that a step trains on."""
    data, policy = make_data(validation_batch_size=2), masked()
    _, record = warm_up(tmp_path, 6, data=data, policy=policy, lr=0.0, limit_val_batches=1.0)
    first, second = record.column("val/loss")
    assert first == second
    rows = list(data.validation_rows)
    parts = []
    for i in (0, 1):
        generator = generator_of(0, Stream.DEMONSTRATE_HELD_OUT, i, 0)
        numbers_BX = MaskedTokens(STAGE).numbers(2, generator)
        parts.append(naive_loss(policy, data, rows[2 * i : 2 * i + 2], numbers_BX))
    assert first == pytest.approx(sum(parts) / 2, rel=1e-4)


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_stopped_stage_goes_on_bit_for_bit(tmp_path, at):
    """Within an epoch of three steps, and at its end."""
    whole, expected = warm_up(tmp_path / "whole", 7)
    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    warm_up(tmp_path, at, callbacks=[save])
    torch.manual_seed(99)  # the noise is of a stream of its own
    resumed, record = warm_up(tmp_path, 7, ckpt_path=f"{tmp_path}/last.ckpt")
    assert same(dict(resumed.policy.named_parameters()), dict(whole.policy.named_parameters()))
    assert record.column("loss") == expected.column("loss")[at:]


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(tmp_path, message, **options):
    policy = options.setdefault("policy", masked())
    policy.load_network = lambda: pytest.fail("loaded")
    with pytest.raises(UserError, match=message):
        warm_up(tmp_path, 1, **options)


def test_the_likelihood_must_be_that_of_the_policy(tmp_path):
    refused(tmp_path, "masked language model, .*: give `likelihood: {canvas: N}`", likelihood=None)
    refused(tmp_path, "causal language model, .*: give `likelihood: null`", policy=make_policy())


def test_a_canvas_that_does_not_fit_is_refused(tmp_path):
    refused(tmp_path, r"has \d+ tokens .* canvas of 5: raise", likelihood=MaskedTokens(5))
    refused(
        tmp_path,
        "`likelihood.canvas` is 12, together more than the model's 14 positions",
        policy=masked(max_length=14),
    )


def test_a_demonstration_with_a_barred_token_is_refused(tmp_path):
    data = make_data()
    rows = [PromptRow("1+1=", "2", solution="<mask>2")]
    data.load = lambda: replace(type(data).load(data), train=rows)
    refused(tmp_path, "solution of .*'1\\+1='.* holds '<mask>', which a masked", data=data)
