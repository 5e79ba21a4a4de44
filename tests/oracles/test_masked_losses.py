"""The losses of ESPO, BGPO, AGRPO, diffu-GRPO and coupled-GRPO against loops over rows, copies and tokens.

The loops are written from the formulas of docs/algorithms.md 17, with the masks of the rows and a small network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.action_spaces import SequenceActions, TokenActions
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.likelihoods import CoupledElbo, Denoising, Elbo
from lightning_mpo.objective.linear_bound import LinearBound
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.one_pass import CoupledTokens, MeanField
from lightning_mpo.objective.reductions import ConstantLength, TokenMean
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.rollout.noised import score_noised, with_noise
from lightning_mpo.types import NEVER, Experience, take_rows
from tests.support.builders import VOCABULARY, relative_error, seeded
from tests.support.masked_network import BothSides, NoisedScorer, copies_of, logprobs_of
from tests.support.masked_rollouts import ENDS, judged, masked_rollout

B, T, BETA, EPS = len(ENDS), 8, 0.3, 0.2
ADVANTAGES = torch.tensor([0.8, -0.5, -0.3, 1.1, -1.4, 0.3], dtype=torch.float64)


def network(size: float) -> BothSides:
    """Return the policy, `size` away from the weights that sampled."""
    made, g = BothSides(VOCABULARY, 5 + T), seeded(8)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(0.3)
            weight.add_(size * torch.randn(weight.shape, generator=g, dtype=torch.float64))
    return made


OLD, REFERENCE = network(0.0), network(0.05)


@dataclass
class Row:
    """A noised row, with the log-probs of its hidden tokens under the copies."""

    index: int  # of the response
    advantage: float
    now: list[dict[int, Tensor]]
    old: list[dict[int, Tensor]]
    reference: list[dict[int, Tensor]]


def clipped(ratio: Tensor, advantage: float, eps: float = EPS) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)


def espo(rows: list[Row], made: Experience) -> Tensor:
    """-1/B Σ min(ρ A, clip(ρ) A) + β/(B L) Σ ½ (E - E_ref)², ρ = exp((E - E_old) / L)."""

    def elbo(copies: list[dict[int, Tensor]]) -> Tensor:
        total, pairs = torch.zeros((), dtype=torch.float64), len(copies) // 2
        for j in range(pairs):
            masked, rest = copies[2 * j], copies[2 * j + 1]
            first = sum(masked.values()) * (T + 1) / max(len(masked), 1)
            second = sum(rest.values()) * (T + 1) / max(len(rest), 1)
            total = total + 0.5 * (first + second) / pairs
        return total

    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        now, old = elbo(row.now), elbo(row.old).detach()
        loss = loss + clipped(((now - old) / T).exp(), row.advantage) / len(rows)
        loss = loss + BETA * 0.5 * (now - elbo(row.reference).detach()) ** 2 / (len(rows) * T)
    return loss


def bgpo(rows: list[Row], made: Experience) -> Tensor:
    """-1/(B n) Σ (1 + d) A or exp(d) A, d = (L / l) Σ_masked (log p - log p_old)."""
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        d = sum(
            (value - row.old[0][t].detach()) * T / len(row.now[0])
            for t, value in row.now[0].items()
        )
        bound = (1 + d) * row.advantage if row.advantage >= 0 else d.exp() * row.advantage
        loss = loss - bound / len(rows)
    return loss


def agrpo(rows: list[Row], made: Experience) -> Tensor:
    """1/(n G) Σ_steps w Σ_tokens min(r A, clip(r) A), with G all rows of the update."""
    reveal_BT = made.rollout.reveal_BT
    assert reveal_BT is not None
    loss = torch.zeros((), dtype=torch.float64)
    for b, row in enumerate(rows):
        hidden = row.now[0]
        step = min(int(reveal_BT[b, t]) for t in hidden)
        for t, value in hidden.items():
            if int(reveal_BT[b, t]) == step:
                old = made.rollout.behaviour_logprobs_BT[b, t].double()
                weight = float(made.token_weights_BT[b, t])
                loss = loss + weight * clipped((value - old).exp(), row.advantage) / len(rows)
    return loss


def tokens(estimate: Callable[[Row, int], tuple[Tensor, Tensor, Tensor]]):
    """Return the token mean of a clipped ratio and k3, from an estimate of a token's log-prob."""

    def loss_of(rows: list[Row], made: Experience) -> Tensor:
        mask_BT = masked_rollout().response_mask_BT
        loss, count = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            for t in mask_BT[row.index].nonzero()[:, 0].tolist():
                now, old, reference = estimate(row, t)
                difference = reference.detach() - now
                loss = loss + clipped((now - old.detach()).exp(), row.advantage, 0.5)
                loss = loss + BETA * (difference.exp() - difference - 1)
                count += 1
        return loss / count

    return loss_of


def mean_field(row: Row, t: int) -> tuple[Tensor, Tensor, Tensor]:
    return row.now[0][t], row.old[0][t], row.reference[0][t]


def coupled(row: Row, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(full) + log p(pair) / share) / 2, with the share of the copy that hides the token."""
    share = {1: 0.3, 2: 0.7}
    copy = 1 if t in row.now[1] else 2

    def value(copies: list[dict[int, Tensor]]) -> Tensor:
        return (copies[0][t] + copies[copy][t] / share[copy]) / 2

    return value(row.now), value(row.old), value(row.reference)


K2 = KLPenalty(ConstantCoefficient(BETA), "k2", level="sequence")
K3 = KLPenalty(ConstantCoefficient(BETA), "k3")
CASES: dict[str, tuple[Objective, Callable[[list[Row], Experience], Tensor]]] = {
    "ESPO": (
        Objective(actions=SequenceActions(), likelihood=CoupledElbo(pairs=2), terms=[K2]),
        espo,
    ),
    "BGPO": (
        Objective(
            actions=SequenceActions(mean=False), surrogate=LinearBound(), likelihood=Elbo(samples=4)
        ),
        bgpo,
    ),
    "AGRPO": (
        Objective(reduction=ConstantLength(1), likelihood=Denoising(steps=4)),
        agrpo,
    ),
    "AGRPO by entropy": (
        Objective(reduction=ConstantLength(1), likelihood=Denoising(steps=4, importance="entropy")),
        agrpo,
    ),
    "diffu-GRPO": (
        Objective(
            actions=TokenActions(),
            surrogate=ClippedRatio(0.5, 0.5),
            reduction=TokenMean(),
            likelihood=MeanField(prompt_share=0.0),
            terms=[K3],
        ),
        tokens(mean_field),
    ),
    "coupled-GRPO": (
        Objective(
            actions=TokenActions(),
            surrogate=ClippedRatio(0.5, 0.5),
            reduction=TokenMean(),
            likelihood=CoupledTokens(least=0.3, most=0.3),
            terms=[K3],
        ),
        tokens(coupled),
    ),
}


def prepared(objective: Objective) -> Experience:
    """Return noised and scored rows; the sampler's log-probs are those of its own steps."""
    likelihood, rollout = objective.likelihood, masked_rollout()
    assert likelihood is not None
    assert rollout.reveal_BT is not None
    behaviour_BT = torch.zeros(B, T)
    for b in range(B):
        for step in rollout.reveal_BT[b].unique().tolist():
            if step != NEVER:
                hidden = set((rollout.reveal_BT[b] >= step).nonzero()[:, 0].tolist())
                values = logprobs_of(OLD, rollout.tokens_BL[b], hidden, T)
                for t in (rollout.reveal_BT[b] == step).nonzero()[:, 0].tolist():
                    behaviour_BT[b, t] = values[t].detach()
    rollout = replace(rollout, behaviour_logprobs_BT=behaviour_BT)
    made = with_noise(judged(rollout, ADVANTAGES), likelihood, seeded(0), passes=1)
    scorer: Any = NoisedScorer(OLD, REFERENCE)
    done = score_noised(scorer, objective, made, updates=2, reference=bool(objective.terms))
    names = ("old_logprobs_BT", "reference_logprobs_BT")
    return replace(
        done,
        **{n: v.detach() for n in names if (v := getattr(done, n)) is not None},
    )


def rows_of(made: Experience, policy: BothSides, repeats: int) -> list[Row]:
    rows = []
    for b in range(len(made.rewards_B)):
        hidden, row_L = copies_of(made, b), made.rollout.tokens_BL[b]
        now, old, reference = (
            [logprobs_of(net, row_L, places, T) for places in hidden]
            for net in (policy, OLD, REFERENCE)
        )
        rows.append(Row(b // repeats, float(ADVANTAGES[b // repeats]), now, old, reference))
    return rows


@pytest.mark.parametrize("size", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_loops(name, size):
    objective, naive = CASES[name]
    made, policy = prepared(objective), network(size)
    assert objective.likelihood is not None
    scorer, denominators = NoisedScorer(policy, REFERENCE), objective.denominators(made)
    # ours, in micro-batches that cut through the samples of a response
    total, gradient = 0.0, torch.zeros(())
    for rows in torch.arange(len(made.rewards_B)).split(5):
        part = take_rows(made, rows)
        loss, _ = objective.loss(part, scorer.score(part.rollout), denominators)
        total += float(loss)
        gradient = gradient + policy.flat_gradient(loss)
    # the loops
    expected = naive(rows_of(made, policy, objective.likelihood.repeats), made)
    assert total == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
    assert relative_error(gradient, policy.flat_gradient(expected)) < 1e-5
    assert math.isfinite(total)
    assert gradient.norm() > 1e-6


def test_rows_of_a_response_in_any_micro_batch_add_up_for_one_backward_pass():
    """Micro-batches of single samples have the gradient of one graph over all of them (BGPO)."""
    objective, _ = CASES["BGPO"]
    made, policy = prepared(objective), network(0.1)
    scorer, denominators = NoisedScorer(policy, REFERENCE), objective.denominators(made)
    whole, _ = objective.loss(made, scorer.score(made.rollout), denominators)
    together, single = policy.flat_gradient(whole), torch.zeros(())
    for rows in torch.arange(len(made.rewards_B)).split(1):
        part = take_rows(made, rows)
        loss, _ = objective.loss(part, scorer.score(part.rollout), denominators)
        single = single + policy.flat_gradient(loss)
    assert relative_error(single, together) < 1e-9
