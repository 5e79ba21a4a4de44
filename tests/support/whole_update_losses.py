"""The oracle of whole updates, second half: from rewards to the loss, in loops over rows, tokens and offsets.

Written from docs/algorithms.md 3.2 to 3.7, 4.1, 4.4, 4.5, 5.2, 7, 8, 10 and 11.2. Advantages are Python floats. The
gradient of the loss is that of plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.support.whole_updates import (
    HIGH,
    KL_COEF,
    LOW,
    VALUE_COEF,
    Case,
    Row,
    RowScores,
    score,
)

# --- advantages -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimates:
    """Of each row and token, at rollout weights."""

    advantages: list[list[float]]
    future: list[list[float]] | None  # of the later tokens of a block, if they have their own
    returns: list[list[float]] | None


def estimate(
    case: Case, rows: Sequence[Row], old: Sequence[RowScores], reference: list[list[float]] | None
) -> Estimates:
    """Go from rewards to advantages."""
    # the reward stands at the last token, less the divergence k1 if it is part of the reward
    rewards = []
    for b, row in enumerate(rows):
        rewards.append([0.0] * (len(row.response) - 1) + [row.reward])
        if case.kl == "reward":
            assert reference is not None
            for t in range(len(row.response)):
                rewards[b][t] -= KL_COEF * (old[b].token[t].item() - reference[b][t])
    totals = [sum(row) for row in rewards]
    # advantages and returns
    returns = None
    if case.advantage == "group":
        advantages = [[outcome(rows, totals, b)] * len(row.response) for b, row in enumerate(rows)]
    else:
        values = [[value.item() for value in scores.value] for scores in old]
        advantages = [gae(case, r, v) for r, v in zip(rewards, values, strict=True)]
        for b, row in enumerate(rows):
            advantages[b] = [a * row.valid for a in advantages[b]]
        returns = [
            [a + v for a, v in zip(pair[0], pair[1], strict=True)]
            for pair in zip(advantages, values, strict=True)
        ]
        advantages = whitened(rows, advantages)
    # advantages of the later tokens
    if case.credit is None:
        return Estimates(advantages, None, returns)
    future = []
    for b, row in enumerate(rows):
        spots = range(len(row.response))
        line = [later_advantage(case.credit, rows, totals, advantages, b, t) for t in spots]
        future.append([advantage * row.valid for advantage in line])
    return Estimates(advantages, future, returns)


def gae(case: Case, rewards: list[float], values: list[float]) -> list[float]:
    """A_t = Σ_k (γ^N λ)^k Δ_{t+kN} with Δ_t = Σ_{n<N} γ^n r_{t+n} + γ^N V_{t+N} - V_t."""
    T, N, gamma = len(rewards), case.action, case.gamma
    deltas = [
        sum(gamma**n * rewards[t + n] for n in range(min(N, T - t)))
        + (gamma**N * values[t + N] if t + N < T else 0.0)
        - values[t]
        for t in range(T)
    ]
    return [
        sum((gamma**N * case.lam) ** k * deltas[s] for k, s in enumerate(range(t, T, N)))
        for t in range(T)
    ]


def whitened(rows: Sequence[Row], advantages: list[list[float]]) -> list[list[float]]:
    values = [a for row, line in zip(rows, advantages, strict=True) if row.valid for a in line]
    mean = sum(values) / len(values)
    variance = sum((a - mean) ** 2 for a in values) / (len(values) - 1)
    return [
        [(a - mean) / math.sqrt(variance + 1e-8) if row.valid else 0.0 for a in line]
        for row, line in zip(rows, advantages, strict=True)
    ]


def outcome(rows: Sequence[Row], totals: list[float], b: int) -> float:
    """(R - mean) / (std + 1e-4) within the valid rows of the group."""
    group = [totals[i] for i, row in enumerate(rows) if row.valid and row.group == rows[b].group]
    if not rows[b].valid or max(group) == min(group):
        return 0.0
    mean = sum(group) / len(group)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
    return (totals[b] - mean) / (deviation + 1e-4)


def later_advantage(
    credit: str,
    rows: Sequence[Row],
    totals: list[float],
    advantages: list[list[float]],
    b: int,
    t: int,
) -> float:
    """Return the advantage of the later tokens of the block at t, before negatives are dropped or bounded."""
    if credit == "same":
        return advantages[b][t]
    if credit == "outcome":
        return outcome(rows, totals, b)
    # the valid rows of the group that reach t
    peers = [
        i
        for i, row in enumerate(rows)
        if row.valid and row.group == rows[b].group and len(row.response) > t
    ]
    if not rows[b].valid:
        return 0.0
    if credit == "centred":
        return advantages[b][t] - sum(advantages[i][t] for i in peers) / len(peers)
    peers = [i for i in peers if rows[i].response[:t] == rows[b].response[:t]]
    return totals[b] - sum(totals[i] for i in peers) / len(peers)


@dataclass
class Watch:
    """Counts the places where a clip stops the gradient, and the distance to the nearest kink of the loss."""

    actions: int = 0
    clipped: int = 0
    values_clipped: int = 0
    margins: list[float] = field(default_factory=list)


# --- loss -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Old:
    """All that an update knows of rollout weights."""

    scores: list[RowScores]
    estimates: Estimates
    reference: list[list[float]] | None


def loss(
    case: Case,
    policy: nn.Module,
    rows: Sequence[Row],
    numbers: Sequence[int],
    old: Old,
    watch: Watch,
) -> Tensor:
    """Return the loss of the mini-batch of these rows."""
    blocks, errors, upkeeps, divergences = [], [], [], []
    for b in numbers:
        if not rows[b].learns:
            continue
        now, runs = score(case, policy, rows[b]), rows[b].runs
        tokens = [(t, end) for start, end in runs for t in range(start, end)]
        blocks.append(
            [
                block_loss(case, now, old, b, range(t, end), watch)
                for start, end in runs
                for t in range(start, end, case.stride)
            ]
        )
        if case.advantage == "gae":
            errors.append([(1, value_error(case, now, old, b, t, watch)) for t, _ in tokens])
        if case.offsets and case.upkeep:
            upkeeps.append([(1, upkeep(case, now, t, end)) for t, end in tokens])
        if case.kl == "loss":
            divergences.append([(1, k3(now.token[t], old.reference[b][t])) for t, _ in tokens])
    return (
        mean(case, blocks)
        + VALUE_COEF * mean(case, errors)
        + case.upkeep * mean(case, upkeeps)
        + KL_COEF * mean(case, divergences)
    )


def mean(case: Case, rows: list[list[tuple[int, Tensor]]]) -> Tensor | float:
    """Average over tokens, or over the means of rows."""
    if not rows:
        return 0.0
    sums = [sum(weight * value for weight, value in row) for row in rows]
    counts = [sum(weight for weight, _ in row) for row in rows]
    if case.reduction == "tokens":
        return sum(sums) / sum(counts)
    return sum(total / count for total, count in zip(sums, counts, strict=True)) / len(rows)


def block_loss(
    case: Case, now: RowScores, old: Old, b: int, run: range, watch: Watch
) -> tuple[int, Tensor]:
    """Return the tokens that the block at the start of a run stands for, and its loss."""
    N, t, before = case.length, run[0], old.scores[b]
    alive = min(N, len(run))
    betas = [1 - case.share] + [case.share / (N - 1)] * (N - 1)
    if case.renormalises:
        betas = [beta / sum(betas[:alive]) for beta in betas[:alive]] + [0.0] * (N - alive)
    # log-ratios of the block's tokens
    ratios = []
    for n in range(alive):
        if n == 0 or case.source == "backbone":
            ratios.append(now.token[t + n] - before.token[t + n].item())
        else:
            ratios.append(now.future[n - 1][t] - before.future[n - 1][t].item())
    block = sum(betas[n] * ratios[n] for n in range(alive))
    first = old.estimates.advantages[b][t]
    weight = min(case.stride, len(run))
    if old.estimates.future is None:
        return weight, clipped(block.exp(), first, watch)
    # each offset with its advantage: the value of the block, the gradient of the offset
    total = 0.0
    for n in range(N):
        if betas[n] == 0:
            continue
        advantage = first if n == 0 else offset_advantage(case, old, b, t, n)
        shifted = block.detach()
        if n < alive:
            shifted = shifted + ratios[n] - ratios[n].detach()
        total = total + betas[n] * clipped(shifted.exp(), advantage, watch)
    return weight, total


def offset_advantage(case: Case, old: Old, b: int, t: int, n: int) -> float:
    """Drop or bound a negative advantage of a later token."""
    advantage, scores = old.estimates.future[b][t], old.scores[b]
    if advantage >= 0 or case.negatives == "keep":
        return advantage
    if case.negatives == "drop":
        return 0.0
    if t + n >= len(scores.token):
        return advantage
    head, policy = scores.future[n - 1][t].exp().item(), scores.token[t + n].exp().item()
    return advantage * min(1.0, head / policy)


def clipped(ratio: Tensor, advantage: float, watch: Watch) -> Tensor:
    """-min(R A, clip(R, 1 - low, 1 + high) A)"""
    inside = ratio.clamp(1 - LOW, 1 + HIGH)
    watch.actions += 1
    watch.clipped += (ratio * advantage > inside * advantage).item()
    watch.margins += [abs(ratio.item() - 1 + LOW), abs(ratio.item() - 1 - HIGH)]
    return -torch.min(ratio * advantage, inside * advantage)


def value_error(case: Case, now: RowScores, old: Old, b: int, t: int, watch: Watch) -> Tensor:
    """½ max((V - R)², (V_old + clip(V - V_old, -c, c) - R)²)"""
    value, before = now.value[t], old.scores[b].value[t].item()
    target, clip = old.estimates.returns[b][t], case.value_clip
    free = (value - target) ** 2
    if clip is None:
        return free / 2
    step = value - before
    watch.margins += [abs(step.item() - clip), abs(step.item() + clip)]
    if abs(step.item()) <= clip:
        return free / 2
    held = (before + step.clamp(-clip, clip) - target) ** 2
    watch.values_clipped += (held > free).item()
    watch.margins += [abs((held - free).item())]
    return torch.max(free, held) / 2


def upkeep(case: Case, now: RowScores, t: int, end: int) -> Tensor | float:
    """-(1/M) Σ_n log q_n(o_{t+n} | h_t), 0 where there is no such token."""
    lines = [line[t] for n, line in enumerate(now.upkeep, start=1) if t + n < end]
    return -sum(lines) / case.offsets


def k3(now: Tensor, reference: float) -> Tensor:
    return (reference - now).exp() - (reference - now) - 1
