"""Weights of single tokens through the composed loss, with a loop that defines it.

The policy of these tests is a table of logits `[B, T, V]` in float64; docs/algorithms.md 16.5 numbers the invariants.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.action_spaces import TokenActions
from lightning_mpo.objective.advantages import GroupRelative
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.selection import AllTokens
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.surrogates import PolicyGradient
from lightning_mpo.objective.terms import EntropyBonus
from lightning_mpo.types import Experience, take_rows, trim
from tests.support.builders import VOCABULARY as V
from tests.support.builders import make_experience, right_padded, scores_of, seeded

MASK = right_padded([7, 3, 1, 9, 5, 4, 0, 6], 9)
VALID = torch.tensor([True, True, True, True, False, True, True, True])
B, T = MASK.shape
REDUCTIONS = [TokenMean(), SequenceMean(), ConstantLength(12)]
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda r: type(r).__name__)
KL = KLPenalty(ConstantCoefficient(0.3), "k3", "loss")
PARTS = [[[0, 1, 2], [3, 4, 5, 6, 7]], [[b] for b in range(B)], [[6], [7, 0, 3], [1, 2, 5, 4]]]


def compose(selection=None, surrogate=None, reduction=None, **fields) -> Objective:
    return Objective(
        **{
            "support": FullVocabulary(),
            "actions": TokenActions(),
            "advantage": GroupRelative(),
            "surrogate": surrogate or PolicyGradient(),
            "selection": selection or AllTokens(),
            "reduction": reduction or TokenMean(),
        }
        | fields
    )


def table(shape: torch.Size = MASK.shape) -> Tensor:
    return torch.randn(*shape, V, generator=seeded(0), dtype=torch.float64)


def experience(
    weights: Tensor | None = None, mask: Tensor = MASK, valid: Tensor = VALID, spread: float = 0.3
):
    """Return random advantages of tokens, and old and reference log-probs near those of `table()`."""
    advantages = (
        torch.randn(mask.shape, generator=seeded(1), dtype=torch.float64) * mask * valid[:, None]
    )
    batch = make_experience(mask, advantages, valid=valid, weights=weights)
    now = scores_of(table(mask.shape), batch.rollout.responses_BT, mask).logprobs_BT
    noise = [
        spread * torch.randn(mask.shape, generator=seeded(s), dtype=torch.float64) for s in (2, 3)
    ]
    old, reference = (torch.where(mask, now + n, 0.0) for n in noise)
    return replace(batch, old_logprobs_BT=old, reference_logprobs_BT=reference)


def loss_and_gradient(
    objective: Objective, batch: Experience, parts: list[list[int]] | None = None
):
    """Return loss and gradient of a mini-batch, in one piece or in micro-batches."""
    logits = table(batch.mask_BT.shape).requires_grad_()
    denominators = objective.denominators(batch)
    total = torch.zeros(()).double()
    for rows in parts or [list(range(len(batch.valid_B)))]:
        index = torch.tensor(rows)
        part = trim(take_rows(batch, index))
        scores = scores_of(
            logits[index][:, : part.mask_BT.shape[1]], part.rollout.responses_BT, part.mask_BT
        )
        total = total + objective.loss(part, scores, denominators)[0]
    return total.item(), torch.autograd.grad(total, logits)[0]


def naive_mean(reduction, values: list[list[tuple[Tensor, float]]], whole: list[float]) -> Tensor:
    """Reduce (value, weight) by row; `whole` is what a row's mean is taken over."""
    rows = sum(n > 0 for n in whole)
    sums = [sum((w * x for x, w in row), torch.zeros(()).double()) for row in values]
    if isinstance(reduction, SequenceMean):
        return sum(s / n for s, n in zip(sums, whole, strict=True) if n > 0) / rows
    return sum(sums) / (sum(whole) if isinstance(reduction, TokenMean) else rows * reduction.length)


def naive_loss(objective: Objective, batch: Experience, logits: Tensor) -> Tensor:
    """Return the loss of a mini-batch, one token at a time."""
    losses, penalties, entropies, whole = [], [], [], []
    weights = batch.token_weights_BT.double()
    for b in range(len(logits)):
        inside = [
            t
            for t in range(logits.shape[1])
            if batch.rollout.response_mask_BT[b, t] and batch.valid_B[b]
        ]
        kept = [t for t in inside if weights[b, t] > 0]
        whole.append(
            float(len(inside))
            if objective.selection.averages_over_all_tokens
            else sum(weights[b, t].item() for t in kept)
        )
        rows = {t: logits[b, t].log_softmax(0) for t in kept}
        now = {t: rows[t][batch.rollout.responses_BT[b, t]] for t in kept}
        loss = {}
        for t in kept:
            ratio, gain = (now[t] - batch.old_logprobs_BT[b, t]).exp(), batch.advantages_BT[b, t]
            if isinstance(objective.surrogate, PolicyGradient):
                loss[t] = -gain * ratio.log()
            else:
                loss[t] = -min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            if batch.correction_BT is not None:
                loss[t] = loss[t] * batch.correction_BT[b, t].item()
        gaps = {t: batch.reference_logprobs_BT[b, t] - now[t] for t in kept}
        losses.append([(loss[t], weights[b, t].item()) for t in kept])
        penalties.append([(gaps[t].exp() - gaps[t] - 1, weights[b, t].item()) for t in kept])
        entropies.append([(-(rows[t].exp() * rows[t]).sum(), weights[b, t].item()) for t in kept])
    total = naive_mean(objective.reduction, losses, whole)
    if objective.term(KLPenalty) is not None:
        total = total + 0.3 * naive_mean(objective.reduction, penalties, whole)
    bonus = objective.term(EntropyBonus)
    if bonus is not None:
        total = total - bonus.coef * naive_mean(objective.reduction, entropies, whole)
    return total
