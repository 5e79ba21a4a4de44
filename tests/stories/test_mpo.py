"""MPO with multi-token heads, through the whole loss: the invariants of docs/algorithms.md 16.1 and a naive loop.

Policy and heads are tables of logits in float64: `[B, T, V]` for the token, `[B, T, M, V]` for the offsets behind it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_mpo.errors import UserError
from lightning_mpo.functional.actions import window
from lightning_mpo.objective.action_spaces import TokenActions
from lightning_mpo.objective.advantages import GroupRelative
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import (
    BlockWeights,
    ExplicitWeights,
    FutureShare,
    GeometricDecay,
)
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import SequenceMean, TokenMean
from lightning_mpo.objective.selection import AllTokens
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.objective.terms import HeadUpkeep
from lightning_mpo.types import Experience, take_rows, trim
from tests.support.builders import VOCABULARY as V
from tests.support.builders import make_experience, right_padded, scores_of, seeded

N = 4
M = N - 1
PLAIN = right_padded([7, 3, 1, 9, 5, 4, 0, 6], 10)
GAPS = PLAIN & (torch.rand(PLAIN.shape, generator=seeded(6)) < 0.8)
B, T = PLAIN.shape
each_mask = pytest.mark.parametrize("mask", [PLAIN, GAPS], ids=["plain", "gaps"])
WEIGHTS = [FutureShare(0.2), GeometricDecay(0.5), GeometricDecay(1.0)]
each_weights = pytest.mark.parametrize("weights", WEIGHTS, ids=["share", "decay", "uniform"])


def compose(
    weights: BlockWeights | None = None,
    *,
    length: int = N,
    upkeep=None,
    reduction=None,
    low=0.2,
    **block,
):
    actions = BlockActions(
        weights or FutureShare(0.3), length=length, **({"source": "mtp"} | block)
    )
    return Objective(
        FullVocabulary(),
        actions,
        GroupRelative(),
        ClippedRatio(low, 0.2),
        AllTokens(),
        reduction or TokenMean(),
        terms=[upkeep] if upkeep else [],
    )


def tables(seed: int = 0, rows: int = B, width: int = T) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    token = torch.randn(rows, width, V, generator=g, dtype=torch.float64)
    return token, torch.randn(rows, width, M, V, generator=g, dtype=torch.float64)


def future_of(logits: Tensor, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log q_n(o_{t+n} | h_t), position by position."""
    logprobs = logits.log_softmax(-1)
    columns = []
    for n in range(1, logits.shape[2] + 1):
        ahead = pad(tokens_BT[:, n:], (0, min(n, tokens_BT.shape[1])))
        chosen = logprobs[:, :, n - 1].gather(2, ahead[..., None])[..., 0]
        columns.append(torch.where(window(mask_BT, n), chosen, 0.0))
    return torch.stack(columns, -1)


def experience(mask: Tensor, *, off_policy: bool = True) -> Experience:
    advantages = torch.randn(B, T, generator=seeded(1), dtype=torch.float64) * mask
    batch = make_experience(mask, advantages)
    if not off_policy:
        return batch
    tokens = batch.rollout.responses_BT
    token, future = tables()
    near = [
        part + 0.5 * torch.randn(part.shape, generator=seeded(s), dtype=torch.float64)
        for s, part in enumerate((token, future))
    ]
    return replace(
        batch,
        old_logprobs_BT=scores_of(near[0], tokens, mask).logprobs_BT,
        old_future_BTM=future_of(near[1], tokens, mask),
    )


def run(objective: Objective, batch: Experience, parts: list[list[int]] | None = None):
    """Return the loss, the gradients of both tables, and the metrics as means."""
    token, future = (table.requires_grad_() for table in tables())
    denominators, total, sums = objective.denominators(batch), torch.zeros(()).double(), {}
    for rows in parts or [list(range(B))]:
        index = torch.tensor(rows)
        part = trim(take_rows(batch, index))
        width = part.mask_BT.shape[1]
        tokens = part.rollout.responses_BT
        scores = scores_of(token[index][:, :width], tokens, part.mask_BT)
        if objective.actions.future:
            heads = future[index][:, :width, : objective.actions.future]
            values = future_of(heads, tokens, part.mask_BT)
            scores = replace(
                scores, future_BTM=values, upkeep_BTM=values if objective.terms else None
            )
            old = part.old_future_BTM
            part = replace(
                part, old_future_BTM=None if old is None else old[..., : objective.actions.future]
            )
        loss, metrics = objective.loss(part, scores, denominators)
        total = total + loss
        for name, (value, weight) in metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + float(value), before[1] + float(weight))
    gradients = torch.autograd.grad(total, (token, future), allow_unused=True)
    return (
        total.item(),
        *gradients,
        {name: value / max(weight, 1e-9) for name, (value, weight) in sums.items()},
    )


def naive(
    batch: Experience, beta: list[float], *, low: float, high: float, coef: float = 0.0
) -> float:
    """Sum over tokens of -min(R A, clip(R) A), over their number: one window at a time."""
    token, future = tables()
    tokens, mask = batch.rollout.responses_BT, batch.mask_BT
    logp, logq = token.log_softmax(-1), future.log_softmax(-1)
    total, count, upkeep = 0.0, 0, 0.0
    for b in range(B):
        for t in range(T):
            if not mask[b, t]:
                continue
            count += 1
            log_ratio = beta[0] * (logp[b, t, tokens[b, t]] - batch.old_logprobs_BT[b, t]).item()
            for n in range(1, len(beta)):
                if t + n >= T or not mask[b, t + n]:
                    break
                value = logq[b, t, n - 1, tokens[b, t + n]].item()
                log_ratio += beta[n] * (value - batch.old_future_BTM[b, t, n - 1].item())
                upkeep -= value / (len(beta) - 1)
            ratio, advantage = math.exp(log_ratio), batch.advantages_BT[b, t].item()
            total -= min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return (total + coef * upkeep) / count


@each_mask
@each_weights
@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_equals_a_naive_loop(mask, weights, coef):
    batch = experience(mask)
    upkeep = HeadUpkeep(coef) if coef else None
    loss, _, _, metrics = run(compose(weights, upkeep=upkeep), batch)
    assert loss == pytest.approx(
        naive(batch, weights.weights(N), low=0.2, high=0.2, coef=coef), rel=1e-9
    )
    assert 0 < metrics["ratio/clip_fraction"] <= metrics["ratio/token_clip_fraction"]


@each_mask
@pytest.mark.parametrize("length", [1, 2, N])
@pytest.mark.parametrize("source", ["mtp", "backbone"])
@pytest.mark.parametrize("stride", [False, True], ids=["sliding", "disjoint"])
def test_on_policy_every_ratio_is_one(mask, length, source, stride):
    block = {"source": source, "stride": length if stride else 1}
    _, _, _, metrics = run(
        compose(GeometricDecay(0.7), length=length, **block), experience(mask, off_policy=False)
    )
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-12)
    assert metrics["ratio/abs_log"] == 0
    assert metrics["ratio/clip_fraction"] == 0


@each_mask
def test_a_block_of_one_token_is_the_token_level_method(mask):
    batch = experience(mask)
    plain = replace(compose(), actions=TokenActions())
    expected = run(plain, replace(batch, old_future_BTM=None))
    for objective in (compose(length=1), compose(ExplicitWeights([1.0, 0.0, 0.0, 0.0]))):
        loss, gradient, heads, _ = run(objective, batch)
        assert loss == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(gradient, expected[1])
        assert heads is None or not heads.any()


@each_mask
def test_joint_weights_give_the_product(mask):
    batch = experience(mask)
    objective = compose(ExplicitWeights([1.0] * N), ratio="joint")
    assert run(objective, batch)[0] == pytest.approx(
        naive(batch, [1.0] * N, low=0.2, high=0.2), rel=1e-9
    )
    same = replace(compose(), actions=BlockActions(length=N, source="mtp", ratio="joint"))
    assert run(same, batch)[0] == pytest.approx(run(objective, batch)[0], rel=1e-12)


def test_a_constant_log_ratio_passes_through_interior_windows(monkeypatch):
    batch = experience(PLAIN)
    token, future = tables()
    tokens = batch.rollout.responses_BT
    shift = 0.05
    batch = replace(
        batch,
        old_logprobs_BT=scores_of(token, tokens, PLAIN).logprobs_BT - shift,
        old_future_BTM=torch.where(
            torch.stack([window(PLAIN, n) for n in range(1, N)], -1),
            future_of(future, tokens, PLAIN) - shift,
            0.0,
        ),
    )
    objective = compose(GeometricDecay(0.6))
    scores = replace(scores_of(token, tokens, PLAIN), future_BTM=future_of(future, tokens, PLAIN))
    seen = []
    original = objective.surrogate.loss
    monkeypatch.setattr(
        ClippedRatio, "loss", lambda self, actions: seen.append(actions) or original(actions)
    )
    objective.loss(batch, scores, objective.denominators(batch))
    whole = window(PLAIN, M)
    torch.testing.assert_close(
        seen[0].log_ratios_BU[whole], torch.full((int(whole.sum()),), shift).double()
    )


@each_mask
@pytest.mark.parametrize("reduction", [TokenMean(), SequenceMean()], ids=["token", "sequence"])
def test_micro_batches_and_padding_change_nothing(mask, reduction):
    batch = experience(mask)
    objective = compose(upkeep=HeadUpkeep(0.1), reduction=reduction)
    whole, cut = run(objective, batch), run(objective, batch, [[0, 6], [3], [1, 2, 4], [5, 7]])
    assert cut[0] == pytest.approx(whole[0], rel=1e-12)
    for one, other in zip(whole[1:3], cut[1:3], strict=True):
        torch.testing.assert_close(one, other)
    for name, value in whole[3].items():
        if not name.startswith("loss/"):
            assert cut[3][name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_the_gradient_of_a_window_stops_at_a_gap():
    mask = right_padded([8] * B, T).clone()
    mask[:, 4] = False
    _, _, heads, _ = run(compose(GeometricDecay(1.0), low=0.9), experience(mask, off_policy=False))
    for t in range(T):
        for n in range(1, N):
            reached = bool(heads[:, t, n - 1].any())
            assert reached == (t + n < 8 and not any(i == 4 for i in range(t, t + n + 1)))


def test_metrics_by_offset():
    batch = experience(PLAIN)
    _, _, _, metrics = run(compose(), batch)
    tokens, logq = batch.rollout.responses_BT, tables()[1].log_softmax(-1)
    for n in range(1, N):
        values, moves = [], []
        for b, t in window(PLAIN, n).nonzero().tolist():
            values.append(-logq[b, t, n - 1, tokens[b, t + n]].item())
            moves.append(abs(-values[-1] - batch.old_future_BTM[b, t, n - 1].item()))
        assert metrics[f"heads/cross_entropy_{n}"] == pytest.approx(sum(values) / len(values))
        assert metrics[f"heads/abs_log_ratio_{n}"] == pytest.approx(sum(moves) / len(moves))


def test_refusals():
    with pytest.raises(UserError, match="must sum to 1, got 2; set `ratio: joint`"):
        BlockActions(ExplicitWeights([1.0, 1.0]), length=2)
    with pytest.raises(UserError, match="`BlockActions.length` must be at least 1"):
        BlockActions(FutureShare(), length=0, source="mtp")
    with pytest.raises(
        UserError, match="`HeadUpkeep` trains multi-token heads, but `BlockActions` uses none"
    ):
        compose(source="backbone", upkeep=HeadUpkeep())
