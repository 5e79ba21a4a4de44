"""Off policy, loss and gradient equal a loop over tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.action_spaces import SegmentActions, SequenceActions, TokenActions
from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.objective.kl import KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.position_clip import PositionClip
from lightning_mpo.objective.reductions import SequenceMean, TokenMean
from lightning_mpo.objective.surrogates import (
    AsymmetricRatio,
    BoundedTokens,
    ClippedRatio,
    ClippedWeight,
    PolicyGradient,
    Surrogate,
)
from lightning_mpo.objective.terms import EntropyBonus
from lightning_mpo.objective.trace_actions import ForwardTraceActions, PrefixActions
from lightning_mpo.types import Experience
from tests.support.builders import relative_error
from tests.support.objectives import (
    ALGORITHMS,
    COMPOSITIONS,
    SEGMENTS,
    T,
    experience,
    from_yaml,
    known_probabilities,
    loss_and_gradient,
    table,
)


def token_loss(
    ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None
) -> Tensor:
    """-min(r·A, clip(r)·A), and min(that, -c·A) where A < 0."""
    loss = -min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return min(loss, -dual * advantage) if dual is not None and advantage < 0 else loss


def divergence_loss(
    surrogate: DivergenceMask,
    now: Tensor,
    then: Tensor,
    advantage: Tensor,
    known: list[tuple[float, float]],
) -> Tensor:
    """What a token costs in DPPO, from docs/algorithms.md 5.6; `known` are probabilities of candidates, then and now."""
    p, q = now.exp().item(), then.exp().item()
    buckets = known if surrogate.top_k else [(q, p)]
    buckets = [*buckets, (1 - sum(old for old, _ in buckets), 1 - sum(new for _, new in buckets))]
    if surrogate.divergence == "tv":
        distance = sum(abs(old - new) for old, new in buckets) / 2
    else:
        distance = sum(old * math.log(old / new) for old, new in buckets)
    rising = advantage > 0 and p > q and distance > (surrogate.delta_up or surrogate.delta)
    falling = advantage < 0 and p < q and distance > surrogate.delta
    weight = 0.0 if rising or falling else min(p / q, surrogate.cap or math.inf)
    return -weight * advantage * now


def bounded(surrogate: Surrogate, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """What is left of a token's log-ratio before it is grouped."""
    if not isinstance(surrogate, BoundedTokens):
        return log_ratio
    return (
        min(log_ratio, torch.tensor(surrogate.high))
        if advantage > 0
        else max(log_ratio, torch.tensor(-surrogate.low))
    )


def surrogate_loss(
    surrogate: Surrogate, log_ratio: Tensor, advantage: Tensor, position: int
) -> Tensor:
    """What an action costs, from the equations of docs/algorithms.md 5.1 to 5.4 and 5.7."""
    if isinstance(surrogate, PositionClip):
        low, high, dual = (
            math.exp(bound * position**surrogate.power)
            for bound in (-surrogate.low, surrogate.high, surrogate.dual)
        )
        return token_loss(log_ratio.exp(), advantage, 1 - low, high - 1, dual)
    if isinstance(surrogate, BoundedTokens):
        return -log_ratio.exp() * advantage
    if isinstance(surrogate, ClippedRatio):
        return token_loss(log_ratio.exp(), advantage, surrogate.low, surrogate.high, surrogate.dual)
    ratio, weight = log_ratio.exp().item(), 1.0
    if isinstance(surrogate, ClippedWeight):
        weight = min(max(ratio, 1 - surrogate.low), 1 + surrogate.high)
    elif isinstance(surrogate, AsymmetricRatio) and advantage < 0:
        weight = min(ratio, surrogate.cap_negative) if ratio >= 1 - surrogate.low else 0.0
    elif isinstance(surrogate, AsymmetricRatio):
        weight = min(1 / ratio, surrogate.cap_positive) if ratio <= 1 + surrogate.high else 0.0
    else:
        assert isinstance(surrogate, PolicyGradient)
    return -weight * advantage * log_ratio


def naive_actions(actions, ell: list[Tensor], ids: list[int]) -> list[tuple[Tensor, int, int]]:
    """Return (log-ratio, start, tokens it stands for) of each action of one response, as in docs/algorithms.md 3.2 to 3.6."""
    if not ell:
        return []
    if isinstance(actions, TokenActions | ForwardTraceActions):
        return [(x, t, 1) for t, x in enumerate(ell)]
    if isinstance(actions, PrefixActions):
        sums = [
            sum(ell[: t + 1]).detach() / (t + 1 if actions.mean else 1) for t in range(len(ell))
        ]
        return [
            (x - x.detach() + value, t, 1)
            for t, (x, value) in enumerate(zip(ell, sums, strict=True))
        ]
    if isinstance(actions, SequenceActions):
        total = sum(ell)
        if actions.form == "token":  # the value of all, the gradient of one
            return [(x - x.detach() + total.detach() / len(ell), t, 1) for t, x in enumerate(ell)]
        return [(total / len(ell) if actions.mean else total, 0, len(ell))]
    if isinstance(actions, SegmentActions):
        blocks = [[t for t, i in enumerate(ids) if i == j] for j in sorted(set(ids))]
        sums = [
            sum(ell[t] for t in block) / (len(block) if actions.ratio == "mean" else 1)
            for block in blocks
        ]
        return [(value, block[0], len(block)) for value, block in zip(sums, blocks, strict=True)]
    found, beta = [], actions.weights_N
    renorm = actions.tail == "renorm" or (actions.tail is None and actions.stride > 1)
    for start in range(0, len(ell), actions.stride):
        window = ell[start : start + actions.length]
        value = sum(b * x for b, x in zip(beta, window, strict=False))
        if renorm:
            value = value * sum(beta) / sum(beta[: len(window)])
        found.append((value, start, min(actions.stride, len(ell) - start)))
    return found


def naive_factors(actions, ell: list[Tensor]) -> list[float]:
    """Return the factor of each token's loss, as in docs/algorithms.md 3.8."""
    steps = actions.steps if isinstance(actions, ForwardTraceActions) else 1
    return [math.exp(sum(x.item() for x in ell[t + 1 : t + steps])) for t in range(len(ell))]


def naive_reduce(reduction, rows: list[list[tuple[Tensor, int]]]) -> Tensor:
    """Reduce (value, weight) by row."""
    rows = [row for row in rows if row]
    if isinstance(reduction, SequenceMean):
        return sum(sum(x * w for x, w in row) / sum(w for _, w in row) for row in rows) / len(rows)
    total = sum(x * w for row in rows for x, w in row)
    if isinstance(reduction, TokenMean):
        return total / sum(w for row in rows for _, w in row)
    return total / (len(rows) * reduction.length)


def naive_loss(objective: Objective, batch: Experience, logits: Tensor) -> Tensor:
    """Return the loss of a mini-batch, one token at a time."""
    kl, bonus = objective.term(KLPenalty), objective.term(EntropyBonus)
    losses, penalties, entropies = [], [], []
    for b in range(len(logits)):
        tokens = batch.rollout.responses_BT[b]
        where = [t for t in range(T) if batch.mask_BT[b, t]]
        now = {t: logits[b, t].log_softmax(0)[tokens[t]] for t in where}
        old, gain = batch.old_logprobs_BT[b], batch.advantages_BT[b]
        ell = [bounded(objective.surrogate, now[t] - old[t], gain[t]) for t in where]
        found = naive_actions(objective.actions, ell, SEGMENTS[b, where].tolist())
        factors = naive_factors(objective.actions, ell)
        if isinstance(objective.surrogate, DivergenceMask):
            known = [known_probabilities(batch.rollout, logits[b, t].detach(), b, t) for t in where]
            terms = [
                divergence_loss(objective.surrogate, now[t], old[t], gain[t], k)
                for t, k in zip(where, known, strict=False)
            ]
            losses.append([(term * c, 1) for term, c in zip(terms, factors, strict=True)])
        else:
            costs = [
                factors[s] * surrogate_loss(objective.surrogate, x, gain[where[s]], i + 1)
                for i, (x, s, _) in enumerate(found)
            ]
            losses.append([(cost, w) for cost, (_, _, w) in zip(costs, found, strict=True)])
        if kl is not None and kl.place == "loss":
            gaps = [batch.reference_logprobs_BT[b, t] - now[t] for t in where]
            penalties.append([(gap.exp() - gap - 1, 1) for gap in gaps])
        if bonus is not None:
            tables = [logits[b, t].log_softmax(0) for t in where]
            entropies.append([(-(row.exp() * row).sum(), 1) for row in tables])
    loss = naive_reduce(objective.reduction, losses)
    if penalties:
        loss = loss + kl.controller.coefficient * naive_reduce(objective.reduction, penalties)
    if bonus is not None:
        loss = loss - bonus.coef * naive_reduce(objective.reduction, entropies)
    return loss


OFF_POLICY = COMPOSITIONS | {f"configs/{path.stem}": from_yaml(path) for path in ALGORITHMS}


@pytest.mark.parametrize("objective", OFF_POLICY.values(), ids=OFF_POLICY)
def test_off_policy_loss_and_gradient_equal_a_loop_over_tokens(objective):
    batch = experience()
    logits = table().requires_grad_()
    expected = naive_loss(objective, batch, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss, gradient, metrics = loss_and_gradient(objective, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(gradient, expected_gradient) < 1e-6
    divergence = (
        isinstance(objective.surrogate, DivergenceMask) and objective.surrogate.delta > 0.02
    )  # never reached here
    if type(objective.surrogate).clipped is not Surrogate.clipped and not divergence:
        assert (
            0 < metrics["ratio/clip_fraction"][0] < metrics["ratio/clip_fraction"][1]
        )  # both branches were there


def test_the_token_form_of_gspo_has_the_gradient_of_the_sequence_form_until_tokens_differ():
    """Off-policy, both clips reached: docs/algorithms.md 3.6 [V]."""
    batch = experience()
    sequence, token = COMPOSITIONS["gspo"], COMPOSITIONS["gspo_token"]
    (loss, gradient, _), (expected_loss, expected, _) = (
        loss_and_gradient(form, batch) for form in (token, sequence)
    )
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_error(gradient, expected) < 1e-6
    signs_T = torch.ones(T).index_fill(0, torch.arange(1, T, 2), -1.0)
    differing = replace(batch, advantages_BT=batch.advantages_BT * signs_T)
    assert (
        relative_error(
            loss_and_gradient(token, differing)[1], loss_and_gradient(sequence, differing)[1]
        )
        > 0.1
    )
