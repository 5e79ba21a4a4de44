"""Differences between TRL's losses and ours that are on purpose: each is measured, and then accounted for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracle_batches import Batch, algorithm, deviation, draw, ours
from torch import Tensor
from trl_bridge import loss_of_table, trainer
from trl_losses import halves, theirs

from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import TokenMean
from lightning_mpo.objective.surrogates import ClippedRatio, ClippedWeight
from lightning_mpo.objective.terms import EntropyBonus

Measured = tuple[float, float]
"""Relative deviation of the gradients with equal names and numbers, and what is left of it once `why` is put in."""


@dataclass(frozen=True)
class Difference:
    """A place where the same words mean two things."""

    name: str
    why: str
    measure: Callable[[str], Measured]


def gradient(objective: Objective, batch: Batch, **options: Any) -> Tensor:
    return ours(objective, batch, **options)[1]


def both(value: Tensor, explained: Tensor, expected: Tensor) -> Measured:
    return deviation(value, expected), deviation(explained, expected)


def cap_of_cispo(folder: str) -> Measured:
    cispo, batch = algorithm("cispo"), draw(0, 3, 3)
    expected = theirs(trainer(folder, loss_type="cispo", epsilon_high=1.2), batch)[1]
    same, mapped = (replace(cispo, surrogate=ClippedWeight(1.0, high)) for high in (1.2, 1.2 - 1))
    return both(gradient(same, batch), gradient(mapped, batch), expected)


def value_of_cispo(folder: str) -> Measured:
    cispo, batch = algorithm("cispo"), draw(0, 3, 3)
    expected = theirs(trainer(folder, loss_type="cispo", epsilon_high=5.0), batch)[0]
    value = ours(cispo, batch)[0]
    assert batch.old_BT is not None
    weights_BT = (batch.logprobs() - batch.old_BT).exp().clamp(max=5.0) * batch.mask_BT
    constant = (
        -(weights_BT * batch.advantages_B[:, None] * batch.old_BT).sum() / batch.mask_BT.sum()
    )
    return both(value, value + constant, expected)


def weighted_kl(folder: str) -> Measured:
    beta, batch = 0.3, draw(0, 3, 3)
    objective = replace(
        algorithm("dapo"), terms=[KLPenalty(ConstantCoefficient(beta), "k3", "loss")]
    )
    expected = theirs(trainer(folder, loss_type="dapo", epsilon_high=0.28, beta=beta), batch)[1]
    logits_BTV = batch.logits_BTV.clone().requires_grad_()
    now_BT = replace(batch, logits_BTV=logits_BTV).logprobs()
    gap_BT = batch.reference_BT - now_BT
    weight_BT = (now_BT - batch.old_BT).exp() - 1
    extra = (
        beta * (weight_BT * (gap_BT.exp() - gap_BT - 1) * batch.mask_BT).sum() / batch.mask_BT.sum()
    )
    value = gradient(objective, batch)
    return both(value, value + torch.autograd.grad(extra, logits_BTV)[0], expected)


def empty_rows(name: str) -> Callable[[str], Measured]:
    def measure(folder: str) -> Measured:
        full = draw(0, 3, 3, spread=0.15)
        kept_B = torch.arange(9) % 3 > 0  # `mask_truncated_completions` leaves rows without a token
        batch = replace(
            full, scored_BT=full.scored_BT & kept_B[:, None], mask_BT=full.mask_BT & kept_B[:, None]
        )
        options: dict[str, Any] = {"rloo": True} if name == "rloo" else {"loss_type": name}
        expected, value = (
            theirs(trainer(folder, **options), batch)[1],
            gradient(algorithm(name), batch),
        )
        return both(value, value * kept_B.double().mean(), expected)

    return measure


def micro_batches_of_bnpo(folder: str) -> Measured:
    bnpo, batch = replace(algorithm("grpo"), reduction=TokenMean()), draw(0, 4, 2)
    parts = halves(batch, 2)
    expected = theirs(
        trainer(folder, loss_type="bnpo", gradient_accumulation_steps=2), batch, parts
    )[1]
    each = torch.cat([gradient(bnpo, batch.rows(rows)) for rows in parts])
    return both(gradient(bnpo, batch, parts=parts), each / 2, expected)


def updates_of_dapo(folder: str) -> Measured:
    dapo, rollout = algorithm("dapo"), draw(2, 4, 2)
    options = {"loss_type": "dapo", "epsilon_high": 0.28, "per_device_train_batch_size": 4}
    made = trainer(folder, **options, steps_per_generation=2)  # a rollout is spent in two updates
    first = rollout.rows(halves(rollout, 2)[0])
    logits_BTV = first.logits_BTV.clone().requires_grad_()
    inputs = first.inputs() | {"num_items_in_batch": rollout.mask_BT.sum()}
    expected = torch.autograd.grad(loss_of_table(made, inputs, logits_BTV), logits_BTV)[0]
    value = gradient(dapo, first)
    return both(value, value * first.mask_BT.sum() / (rollout.mask_BT.sum() / 2), expected)


def mean_of_entropy(folder: str) -> Measured:
    grpo, batch = algorithm("grpo"), draw(0, 3, 3)
    expected = theirs(trainer(folder, loss_type="grpo", entropy_coef=1.0), batch)[1]
    with_bonus = replace(grpo, terms=[EntropyBonus(1.0)])
    plain, over_tokens = (
        replace(objective, reduction=TokenMean()) for objective in (grpo, with_bonus)
    )
    bonus = gradient(over_tokens, batch) - gradient(plain, batch)
    return both(gradient(with_bonus, batch), gradient(grpo, batch) + bonus, expected)


def extreme_ratios(folder: str) -> Measured:
    grpo, batch = algorithm("grpo"), draw(0, 3, 3)
    assert batch.old_BT is not None
    bad = int(batch.advantages_B.argmin())
    old_BT = batch.old_BT.clone()
    old_BT[bad, 0] = batch.logprobs()[bad, 0] - 25  # e^25 times as probable as it was, and bad
    batch = replace(batch, old_BT=old_BT)
    expected, value = theirs(trainer(folder, loss_type="grpo"), batch)[1], gradient(grpo, batch)
    capped = expected.clone()
    capped[bad, 0] = 0
    return deviation(value, expected), deviation(value, capped)


def small_delta(folder: str) -> Measured:
    grpo, batch = algorithm("grpo"), draw(0, 3, 3)
    expected = theirs(trainer(folder, loss_type="grpo", epsilon_high=0.5, delta=1.2), batch)[1]
    same, mapped = ClippedRatio(0.2, 0.5, dual=1.2), ClippedRatio(0.2, 1.2 - 1, dual=1 + 0.5)
    return both(
        *(gradient(replace(grpo, surrogate=surrogate), batch) for surrogate in (same, mapped)),
        expected,
    )


ROWS = "TRL divides by all rows; we by those that have a token left. Seen with masked truncated responses"
DIFFERENCES = (
    Difference(
        "cispo: `epsilon_high`",
        "TRL's is the cap itself; ours the distance above 1: `high = cap - 1`",
        cap_of_cispo,
    ),
    Difference(
        "cispo: the loss's value",
        "TRL weighs log π, we log π - log π_old; the gradients are equal",
        value_of_cispo,
    ),
    Difference(
        "`beta`: `use_bias_correction_kl`",
        "TRL multiplies k3 by the ratio by default; ours is k3, as in GRPO's paper and TRL with False",
        weighted_kl,
    ),
    Difference("grpo: rows without tokens", ROWS, empty_rows("grpo")),
    Difference("dr_grpo: rows without tokens", ROWS, empty_rows("dr_grpo")),
    Difference("RLOOTrainer: rows without tokens", ROWS, empty_rows("rloo")),
    Difference(
        "bnpo: micro-batches",
        "TRL averages the token means of micro-batches; our `TokenMean` is one mean over the update (TRL's dapo)",
        micro_batches_of_bnpo,
    ),
    Difference(
        "dapo, cispo: several updates a rollout",
        "TRL's `num_items_in_batch` is of the rollout, so that an update is divided by the mean tokens of updates; "
        "ours by its own",
        updates_of_dapo,
    ),
    Difference(
        "grpo: `entropy_coef`",
        "TRL's bonus is a mean over tokens under every loss; ours goes through the objective's reduction",
        mean_of_entropy,
    ),
    Difference(
        "log-ratios beyond 20",
        "we clamp them, so that such a token has no gradient; in TRL a bad one has e^25 times its share",
        extreme_ratios,
    ),
    Difference(
        "`delta` below 1 + `epsilon_high`",
        "TRL caps good actions at `delta` and bad ones at 1 + `epsilon_high`; our `dual` caps bad ones only",
        small_delta,
    ),
)
