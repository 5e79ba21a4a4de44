"""Corrections for a sampler that differs from the trainer, through the composed loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.objective.corrections import MaskedWeights, TruncatedWeights
from lightning_mpo.objective.surrogates import ClippedRatio
from tests.support.builders import relative_error, scores_of, seeded
from tests.support.token_credit import (
    KL,
    MASK,
    PARTS,
    VALID,
    B,
    T,
    compose,
    each_reduction,
    experience,
    loss_and_gradient,
    naive_loss,
    table,
)

CORRECTIONS = [
    TruncatedWeights("token", cap=1.3),
    TruncatedWeights("sequence", cap=1.3),
    MaskedWeights("token", cap=1.3, low=0.6),
    MaskedWeights("sequence", cap=1.5),
]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: f"{type(c).__name__}-{c.level}")
@each_reduction
def test_corrected_losses_equal_a_loop_and_denominators_stay(correction, reduction):
    batch = experience()
    behaviour = batch.old_logprobs_BT + 0.4 * torch.randn(
        B, T, generator=seeded(6), dtype=torch.float64
    )
    corrected = replace(
        batch, correction_BT=correction.weights(batch.old_logprobs_BT, behaviour, MASK)
    )
    objective = compose(
        surrogate=ClippedRatio(), reduction=reduction, correction=correction, terms=[KL]
    )
    assert objective.denominators(corrected) == objective.denominators(batch)
    logits = table().requires_grad_()
    expected = naive_loss(objective, corrected, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    for parts in (None, *PARTS):
        loss, gradient = loss_and_gradient(objective, corrected, parts)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert relative_error(gradient, expected_gradient) < 1e-6
    assert relative_error(loss_and_gradient(objective, batch)[1], expected_gradient) > 0.01


def test_metrics_of_a_correction_are_what_they_say():
    correction = MaskedWeights("token", cap=1.2)
    batch = experience()
    behaviour = batch.old_logprobs_BT + 0.4 * torch.randn(
        B, T, generator=seeded(6), dtype=torch.float64
    )
    weights = correction.weights(batch.old_logprobs_BT, behaviour, MASK)
    batch = replace(batch, correction_BT=weights)
    objective = compose(surrogate=ClippedRatio(), correction=correction)
    scores = scores_of(table(), batch.rollout.responses_BT, batch.mask_BT)
    metrics = objective.loss(batch, scores, objective.denominators(batch))[1]
    counted = [weights[b, t].item() for b, t in (MASK & VALID[:, None]).nonzero().tolist()]
    value, number = metrics["correction/weight"]
    assert value.item() / number.item() == pytest.approx(sum(counted) / len(counted))
    value, number = metrics["correction/masked"]
    assert value.item() / number.item() == pytest.approx(counted.count(0.0) / len(counted))
    assert 0 < counted.count(0.0) < len(counted)
