"""Micro-batches, the order of rows, padding and rows that are not valid change no loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.objective.reductions import ConstantLength, TokenMean
from lightning_mpo.types import take_rows
from tests.support.builders import relative_error, scores_of, seeded
from tests.support.objectives import (
    MASK,
    B,
    compose,
    each,
    experience,
    known_probabilities,
    loss_and_gradient,
    table,
)


@each
@pytest.mark.parametrize(
    "parts", [[[0, 1, 2], [3, 4, 5, 6, 7]], [[b] for b in range(B)], [[6], [7, 0, 3], [1, 2, 5, 4]]]
)
def test_micro_batches_add_up_to_the_mini_batch(objective, parts):
    whole, split = (loss_and_gradient(objective, experience(), p) for p in (None, parts))
    assert split[0] == pytest.approx(whole[0], rel=1e-6)
    assert relative_error(split[1], whole[1]) < 1e-6
    for name, (value, weight) in whole[2].items():
        if not name.startswith("loss/"):
            assert split[2][name] == pytest.approx((value, weight), rel=1e-5, abs=1e-9), name


@each
def test_denominators_add_up_over_parts(objective):
    batch = experience()
    parts = [
        objective.denominators(take_rows(batch, torch.tensor(rows)))
        for rows in ([0, 3], [1, 2, 4, 5, 6, 7])
    ]
    total, whole = parts[0] + parts[1], objective.denominators(batch)
    torch.testing.assert_close(total.actions, whole.actions)
    torch.testing.assert_close(total.tokens, whole.tokens)


@each
def test_the_order_of_rows_and_columns_of_padding_change_nothing(objective):
    batch = experience()
    order = torch.randperm(B, generator=seeded(4))
    expected, moved = (loss_and_gradient(objective, batch, p) for p in (None, [order.tolist()]))
    assert moved[0] == pytest.approx(expected[0], rel=1e-6)
    assert relative_error(moved[1], expected[1]) < 1e-6
    logits = table().requires_grad_()  # untrimmed: T has a column that no row uses
    loss, _ = objective.loss(
        batch,
        scores_of(logits, batch.rollout.responses_BT, MASK, batch.rollout),
        objective.denominators(batch),
    )
    assert loss.item() == pytest.approx(expected[0], rel=1e-12)


@each
@pytest.mark.parametrize("how", ["invalid", "deselected", "empty"])
def test_rows_that_do_not_count_change_nothing_whatever_is_in_them(objective, how):
    counted = torch.tensor([True, True, False, True, True, False, True, True])
    rows = counted.nonzero()[:, 0].tolist()
    whole = experience()
    poison = torch.where(counted[:, None], 0.0, torch.tensor(float("nan"), dtype=torch.float64))
    fields = {
        "old_logprobs_BT": whole.old_logprobs_BT + poison,
        "reference_logprobs_BT": whole.reference_logprobs_BT + poison,
    }
    if how == "invalid":
        batch = replace(whole, valid_B=counted, **fields)
    elif how == "deselected":
        batch = replace(whole, token_weights_BT=whole.token_weights_BT * counted[:, None], **fields)
    else:
        rollout = replace(whole.rollout, response_mask_BT=MASK & counted[:, None])
        batch = replace(whole, rollout=rollout, **fields)
    got = loss_and_gradient(objective, batch)
    logits = table()[rows].requires_grad_()
    part = take_rows(whole, torch.tensor(rows))
    scores = scores_of(logits, part.rollout.responses_BT, part.mask_BT, part.rollout)
    loss, metrics = objective.loss(part, scores, objective.denominators(part))
    (gradient,) = torch.autograd.grad(loss, logits)
    for name, (value, weight) in metrics.items():
        assert got[2][name] == pytest.approx((value.item(), weight.item()), rel=1e-5, abs=1e-9), (
            name
        )
    assert got[0] == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(got[1][rows], gradient) < 1e-6
    assert not got[1][~counted].any()


@each
def test_the_scale_of_the_token_weights_changes_no_mean(objective):
    if isinstance(objective.reduction, ConstantLength):
        objective = replace(objective, reduction=TokenMean())
    batch = experience()
    expected = loss_and_gradient(objective, batch)
    halved = loss_and_gradient(
        objective, replace(batch, token_weights_BT=batch.token_weights_BT / 2)
    )
    assert halved[0] == pytest.approx(expected[0], rel=1e-6)
    assert relative_error(halved[1], expected[1]) < 1e-6


@each
def test_a_batch_without_any_action_has_no_loss_and_no_gradient(objective):
    loss, gradient, _ = loss_and_gradient(
        objective, replace(experience(), valid_B=torch.zeros(B, dtype=torch.bool))
    )
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    "surrogate", [DivergenceMask(0.02), DivergenceMask(0.02, top_k=4)], ids=["binary", "top"]
)
def test_tokens_beyond_the_trust_region_stay_in_the_denominator(surrogate):
    """docs/algorithms.md 16.3, invariant 10: those that are left keep the weight that they had without a mask."""
    batch = experience()
    masked, free = (
        loss_and_gradient(compose(surrogate=s), batch) for s in (surrogate, DivergenceMask(1e9))
    )
    stopped = ~masked[1].any(-1) & MASK
    assert 0 < stopped.sum() < MASK.sum()
    assert torch.equal(masked[1][~stopped], free[1][~stopped])


@pytest.mark.parametrize("top_k", [None, 4])
def test_metrics_of_a_trust_region_are_what_they_say(top_k):
    surrogate, batch = DivergenceMask(0.02, cap=1.2, top_k=top_k), experience()
    metrics = {
        name: value / weight
        for name, (value, weight) in loss_and_gradient(compose(surrogate=surrogate), batch)[
            2
        ].items()
    }
    now = scores_of(table(), batch.rollout.responses_BT, MASK).logprobs_BT
    stopped: dict[bool, list[bool]] = {True: [], False: []}
    distances, capped = [], []
    for b, t in MASK.nonzero().tolist():
        p, q = now[b, t].exp().item(), batch.old_logprobs_BT[b, t].exp().item()
        pairs = known_probabilities(batch.rollout, table()[b, t], b, t) if top_k else [(q, p)]
        rest = [1 - sum(side) for side in zip(*pairs, strict=True)]
        distances.append(sum(abs(old - new) for old, new in [*pairs, rest]) / 2)
        good = batch.advantages_BT[b, t].item() > 0
        stopped[good].append(distances[-1] > 0.02 and (p > q) == good)
        capped.append(p / q > 1.2)
    assert metrics["trust/masked_good"] == pytest.approx(sum(stopped[True]) / len(stopped[True]))
    assert metrics["trust/masked_bad"] == pytest.approx(sum(stopped[False]) / len(stopped[False]))
    assert 0 < sum(stopped[True]) < len(stopped[True])
    assert 0 < sum(stopped[False]) < len(stopped[False])
    assert metrics["trust/divergence"] == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    assert metrics["trust/capped"] == pytest.approx(sum(capped) / len(capped))
    uncapped = loss_and_gradient(
        compose(surrogate=DivergenceMask(0.02, cap=None, top_k=top_k)), batch
    )[2]
    assert "trust/capped" not in uncapped
    assert not any(name.startswith("trust/") for name in loss_and_gradient(compose(), batch)[2])
