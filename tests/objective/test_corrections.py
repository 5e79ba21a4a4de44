"""Weights for a sampler that differs from the trainer: against a loop, and through the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.objective.corrections import MaskedWeights, TruncatedWeights
from lightning_mpo.objective.reductions import SequenceMean, TokenMean
from tests.support.builders import make_experience, relative_error, right_padded, scores_of, seeded
from tests.support.runs import Probe, fit, make_objective

MASK = right_padded([6, 1, 0, 4])
OLD = torch.randn(MASK.shape, generator=seeded(0), dtype=torch.float64) - 1
BEHAVIOUR = OLD + 0.4 * torch.randn(MASK.shape, generator=seeded(1), dtype=torch.float64)
CORRECTIONS = [
    TruncatedWeights("token", 1.1),
    TruncatedWeights("sequence", 1.1),
    MaskedWeights("token", 1.3, 0.7),
    MaskedWeights("sequence", 1.5),
]
each = pytest.mark.parametrize(
    "correction", CORRECTIONS, ids=lambda c: f"{type(c).__name__}-{c.level}"
)


@each
def test_against_a_loop(correction):
    weights = correction.weights(OLD, BEHAVIOUR, MASK)
    seen = set()
    for b in range(len(MASK)):
        where = MASK[b].nonzero()[:, 0].tolist()
        gaps = {t: (OLD[b, t] - BEHAVIOUR[b, t]).item() for t in where}
        for t in where:
            raw = math.exp(sum(gaps.values()) if correction.level == "sequence" else gaps[t])
            if isinstance(correction, TruncatedWeights):
                expected = min(raw, correction.cap)
            else:
                expected = raw if correction.low <= raw <= correction.cap else 0.0
            seen.add(expected == raw)
            assert weights[b, t].item() == pytest.approx(expected, rel=1e-12)
    assert seen == {True, False}, "both sides of the bound were there"


@each
def test_equal_log_probs_weigh_one_and_masked_tokens_are_not_read(correction):
    poison = BEHAVIOUR.masked_fill(~MASK, float("nan"))
    assert torch.equal(correction.weights(OLD, OLD, MASK), torch.ones_like(OLD))
    assert torch.isfinite(correction.weights(OLD, poison, MASK)).all()
    assert not correction.weights(OLD.clone().requires_grad_(), BEHAVIOUR, MASK).requires_grad


@pytest.mark.parametrize("reduction", [TokenMean(), SequenceMean()], ids=["tokens", "sequences"])
@each
def test_losses_are_weighed_and_denominators_are_not(correction, reduction):
    objective = make_objective(correction=correction, reduction=reduction)
    batch = replace(make_experience(MASK, torch.ones_like(OLD) * MASK), old_logprobs_BT=OLD)
    weighed = replace(batch, correction_BT=correction.weights(OLD, BEHAVIOUR, MASK))
    logits = torch.randn(*MASK.shape, 19, generator=seeded(2), dtype=torch.float64).requires_grad_()
    scores = scores_of(logits, batch.rollout.responses_BT, MASK)
    plain, changed = objective.denominators(batch), objective.denominators(weighed)
    assert torch.equal(plain.actions, changed.actions)
    loss, metrics = objective.loss(weighed, scores, changed)
    ratio = (scores.logprobs_BT - OLD).exp().clamp(max=1.2)
    terms = -ratio * weighed.correction_BT * MASK
    rows = (MASK.sum(1) > 0).sum()
    expected = (
        terms.sum() / MASK.sum()
        if isinstance(reduction, TokenMean)
        else (terms.sum(1) / MASK.sum(1).clamp(1)).sum() / rows
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    got, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
    assert relative_error(got, wanted) < 1e-6
    masked, count = metrics["correction/masked"]
    assert masked.item() == ((weighed.correction_BT == 0) & MASK).sum().item()
    assert count.item() == MASK.sum().item()


def test_a_response_is_weighed_as_a_whole_over_sequence_actions():
    correction = TruncatedWeights("sequence", 1.1)
    objective = make_objective(
        actions=SequenceActions(), reduction=SequenceMean(), correction=correction
    )
    batch = replace(make_experience(MASK, torch.ones_like(OLD) * MASK), old_logprobs_BT=OLD)
    weighed = replace(batch, correction_BT=correction.weights(OLD, BEHAVIOUR, MASK))
    logits = torch.randn(*MASK.shape, 19, generator=seeded(2), dtype=torch.float64)
    scores = scores_of(logits, batch.rollout.responses_BT, MASK)
    gaps = torch.where(MASK, scores.logprobs_BT - OLD, 0.0)
    ratio = (gaps.sum(1) / MASK.sum(1).clamp(1)).exp().clamp(max=1.2)
    expected = -(ratio * weighed.correction_BT[:, 0])[MASK.any(1)].mean()
    assert objective.loss(weighed, scores, objective.denominators(weighed))[
        0
    ].item() == pytest.approx(expected.item())


def test_in_a_run_the_sampler_of_the_trainer_itself_needs_no_correction(tmp_path):
    seen = []

    def look(trainer, module, batch, batch_idx):
        part = batch["micro_batch"]
        seen.append(part.correction_BT[part.rollout.response_mask_BT])

    probe = Probe(
        on_train_batch_start=lambda trainer, module, batch, i: look(trainer, module, batch, i)
    )
    run = fit(
        tmp_path,
        objective=make_objective(correction=MaskedWeights("token", 3.0)),
        callbacks=[probe],
    )
    assert len(seen) == 4
    for weights in seen:
        torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=1e-3)
    assert run.record.column("correction/weight") == pytest.approx([1.0] * 4, abs=1e-3)
