"""Gradients of our losses against those of TRL's own `_compute_loss`, for every loss type that both have.

    python benchmarks/oracles/trl_losses.py

Prints three tables in Markdown: losses on tables of logits (float64), whole paths of a tiny model
(gradients of its weights) with advantages, and the places where TRL and we differ. Bounds: 1e-6
relative in float64, 1e-5 in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from oracle_batches import Batch, algorithm, deviation, draw, ours
from torch import Tensor
from trl_bridge import loss_of_table, tiny_model, trainer

from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import TokenMean
from lightning_mpo.objective.surrogates import ClippedRatio, ClippedWeight
from lightning_mpo.objective.terms import EntropyBonus

BOUND, BOUND_32 = 1e-6, 1e-5
GROUPS = ((4, 2), (3, 3), (2, 4), (1, 8))
"""Prompts and responses per prompt of the batches."""


@dataclass(frozen=True)
class Case:
    """One loss on both sides."""

    name: str
    objective: Objective
    trl: dict[str, Any]  # options of its config
    config: str = ""  # our file, where one holds the objective
    spread: float = 0.3  # of log-ratios, in nats: some of the actions must be clipped, and some not
    constant: bool = False  # losses differ by what no gradient knows of
    accumulate: int = 1  # micro-batches of an update


def _cases() -> Iterator[Case]:
    grpo, dr_grpo, dapo, gspo = (algorithm(name) for name in ("grpo", "dr_grpo", "dapo", "gspo"))
    bnpo = replace(grpo, reduction=TokenMean())
    cispo, wide = algorithm("cispo"), {"epsilon": 0.2, "epsilon_high": 0.28}
    sequence = {"importance_sampling_level": "sequence"}
    yield Case("grpo", grpo, {"loss_type": "grpo"}, "grpo")
    yield Case("dr_grpo", dr_grpo, {"loss_type": "dr_grpo"}, "dr_grpo")
    yield Case("dapo (clip-higher)", dapo, {"loss_type": "dapo"} | wide, "dapo")
    yield Case("bnpo", bnpo, {"loss_type": "bnpo"})
    yield Case(
        "cispo",
        cispo,
        {"loss_type": "cispo", "epsilon_high": 5.0},
        "cispo",
        spread=1.0,
        constant=True,
    )
    low_cap = replace(cispo, surrogate=ClippedWeight(1.0, 0.2))
    yield Case(
        "cispo, cap 1.2", low_cap, {"loss_type": "cispo", "epsilon_high": 1.2}, constant=True
    )
    narrow = {"loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4} | sequence
    yield Case("grpo, sequence (GSPO)", gspo, narrow, "gspo", spread=2e-3)
    yield Case(
        "grpo, sequence (GSPO-token)", algorithm("gspo_token"), narrow, "gspo_token", spread=2e-3
    )
    yield Case(
        "dapo, sequence",
        replace(gspo, surrogate=ClippedRatio(0.05, 0.08), reduction=TokenMean()),
        {"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.08} | sequence,
    )
    yield Case(
        "cispo, sequence",
        replace(low_cap, actions=SequenceActions()),
        {"loss_type": "cispo", "epsilon_high": 1.2} | sequence,
        constant=True,
    )
    yield Case("RLOOTrainer", algorithm("rloo"), {"rloo": True}, "rloo", spread=0.15)
    higher = replace(grpo, surrogate=ClippedRatio(0.2, 0.28))
    yield Case("grpo, epsilon_high", higher, {"loss_type": "grpo"} | wide)
    for name, objective in (("grpo", grpo), ("dr_grpo", dr_grpo), ("bnpo", bnpo)):
        dual = replace(objective, surrogate=ClippedRatio(0.2, 0.2, dual=1.5))
        yield Case(f"{name}, delta", dual, {"loss_type": name, "delta": 1.5})
    penalty = KLPenalty(ConstantCoefficient(0.3), "k3", "loss")
    in_loss = {"beta": 0.3, "use_bias_correction_kl": False}
    for name, objective, options in (
        ("grpo", grpo, {}),
        ("dr_grpo", dr_grpo, {}),
        ("dapo", dapo, wide),
        ("cispo", cispo, {"epsilon_high": 5.0}),
    ):
        options = {"loss_type": name} | in_loss | options
        spread, constant = (1.0, True) if name == "cispo" else (0.3, False)
        yield Case(
            f"{name}, beta",
            replace(objective, terms=[penalty]),
            options,
            spread=spread,
            constant=constant,
        )
    gspo_kl = replace(gspo, terms=[penalty])
    yield Case("grpo, sequence, beta", gspo_kl, narrow | in_loss, spread=2e-3)
    bonus = replace(dapo, terms=[EntropyBonus(0.1)])
    yield Case("dapo, entropy_coef", bonus, {"loss_type": "dapo", "entropy_coef": 0.1} | wide)
    yield Case("grpo, 2 micro-batches", grpo, {"loss_type": "grpo"}, "grpo", accumulate=2)
    yield Case(
        "dr_grpo, 2 micro-batches", dr_grpo, {"loss_type": "dr_grpo"}, "dr_grpo", accumulate=2
    )
    yield Case("dapo, 2 micro-batches", dapo, {"loss_type": "dapo"} | wide, "dapo", accumulate=2)


CASES = tuple(_cases())


def batches(case: Case) -> Iterator[Batch]:
    """Draw the batches of a case: several group sizes, with and without gaps, and one on the policy that sampled."""
    gaps = "rloo" not in case.trl  # its trainer knows no tools here
    for seed, (groups, size) in enumerate(GROUPS):
        for holes in {False, gaps}:
            yield draw(seed, groups * case.accumulate, size, spread=case.spread, gaps=holes)
    yield replace(draw(9, 2 * case.accumulate, 4), old_BT=None)


def halves(batch: Batch, pieces: int) -> list[list[int]]:
    """Return rows of micro-batches of one size."""
    size = len(batch.tokens_BT) // pieces
    return [list(range(first, first + size)) for first in range(0, pieces * size, size)]


def theirs(
    made: Any, batch: Batch, parts: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, Tensor]:
    """Return TRL's loss and its gradient with respect to the logits, summed over micro-batches as accumulation does."""
    logits_BTV = batch.logits_BTV.clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for rows in parts or [range(len(batch.tokens_BT))]:
        inputs = batch.rows(rows).inputs() | {"num_items_in_batch": batch.mask_BT.sum()}
        loss = loss + loss_of_table(made, inputs, logits_BTV[list(rows)])
    return loss.detach(), torch.autograd.grad(loss, logits_BTV)[0]


@dataclass(frozen=True)
class Result:
    """What a case came to."""

    batches: int
    gradient: float  # largest relative deviation
    loss: float | None  # largest absolute deviation; None where losses differ by a constant
    clipped: (
        tuple[float, float] | None
    )  # the least and the largest share of actions that were clipped, off-policy


def compare(case: Case, folder: str) -> Result:
    """Compare gradients and losses on every batch of a case."""
    made = trainer(folder, **case.trl | {"gradient_accumulation_steps": case.accumulate})
    gradients, losses, shares = [], [], []
    for batch in batches(case):
        parts = halves(batch, case.accumulate)
        (loss, gradient), (expected_loss, expected) = (
            ours(case.objective, batch, parts),
            theirs(made, batch, parts),
        )
        gradients.append(deviation(gradient, expected))
        losses.append((loss - expected_loss).abs().item())
        shares.append(share_clipped(case.objective, batch))
    off_policy = [share for share in shares[:-1] if share is not None]
    return Result(
        len(gradients),
        max(gradients),
        None if case.constant else max(losses),
        (min(off_policy), max(off_policy)) if off_policy else None,
    )


def share_clipped(objective: Objective, batch: Batch) -> float | None:
    """Return the share of actions that lose their gradient, or, under CISPO, have their weight capped."""
    experience = batch.experience()
    metrics = objective.loss(
        experience, batch.scores(batch.logits_BTV), objective.denominators(experience)
    )[1]
    if "ratio/clip_fraction" in metrics:
        value, weight = metrics["ratio/clip_fraction"]
        return (value / weight).item()
    if not isinstance(objective.surrogate, ClippedWeight) or batch.old_BT is None:
        return None
    ratios_BT = (batch.logprobs() - batch.old_BT).exp()
    return (ratios_BT[batch.mask_BT] > 1 + objective.surrogate.high).double().mean().item()


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print(
            "| "
            + " | ".join(f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in row)
            + " |"
        )
    print()


def tables(folder: str) -> float:
    """Print the three tables and return by what factor a bound was exceeded at most; below 1: none was."""
    from trl_differences import DIFFERENCES
    from trl_whole import ADVANTAGES, PATHS, compare_advantages, compare_paths
    from trl_whole import DIFFERENCES as OF_REWARDS

    worst, rows = 0.0, list[list[object]]()
    for case in CASES:
        result = compare(case, folder)
        share = "" if result.clipped is None else "{:.0%} to {:.0%}".format(*result.clipped)
        loss = "a constant apart" if result.loss is None else result.loss
        rows.append([case.name, file_of(case.config), result.batches, share, result.gradient, loss])
        worst = max(worst, result.gradient / BOUND, (result.loss or 0) / BOUND)
    print_table(
        ("TRL's loss", "ours", "batches", "clipped", "gradient, relative", "loss, absolute"), rows
    )
    rows = []
    for path in PATHS:
        double, single = (compare_paths(path, folder, double=d) for d in (True, False))
        rows.append([path.name, file_of(path.config), double, single])
        worst = max(worst, double / BOUND_32, single / BOUND_32)
    for advantage in ADVANTAGES:
        value = compare_advantages(advantage, folder)
        rows.append([f"advantages: {advantage.name}", advantage.text, "", value])
        worst = max(worst, value / BOUND_32)
    print_table(("TRL, whole path", "ours", "float64 weights", "float32"), rows)
    rows = []
    for difference in (*DIFFERENCES, *OF_REWARDS):
        before, after = difference.measure(folder)
        rows.append([difference.name, before, after, difference.why])
        worst = max(worst, after / BOUND_32)
    print_table(("where they differ", "as named alike", "once accounted for", "why"), rows)
    return worst


def file_of(config: str) -> str:
    return f"`{config}.yaml`" if config else "composed"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as where:
        worst = tables(tiny_model(Path(where)))
    sys.exit(f"a bound was exceeded by a factor of {worst:.1f}" if worst > 1 else 0)


if __name__ == "__main__":
    main()
