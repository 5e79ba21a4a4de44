"""`HeadPolicyLoss` against a loop, in limiting cases, and with a policy that has heads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from lightning_mpo.errors import UserError
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.head_policy_loss import HeadPolicyLoss
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import SequenceMean, TokenMean
from lightning_mpo.policies import ParallelHeads
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.types import take_rows, trim
from tests.support.builders import scores_of, seeded
from tests.support.objectives import MASK, B, T, experience, table
from tests.support.runs import fit, make_objective, make_policy, sgd

M = 2
TERM = HeadPolicyLoss(offsets=M, coef=0.5, low=0.1, high=0.15)


def heads_of(batch) -> torch.Tensor:
    """Return random log-probs of later tokens, `[B, T, M]`, near those of the policy."""
    now = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout).logprobs_BT
    ahead = torch.stack([pad(now[:, n:], (0, n)) for n in range(1, M + 1)], -1)
    return ahead + 0.2 * torch.randn(B, T, M, generator=seeded(9), dtype=torch.float64)


def loss_of(objective: Objective, batch, heads, parts=None):
    denominators, total, sums = objective.denominators(batch), 0.0, {}
    for rows in parts or [list(range(B))]:
        index = torch.tensor(rows)
        part = trim(take_rows(batch, index))
        width = part.mask_BT.shape[1]
        scores = scores_of(
            table()[index][:, :width], part.rollout.responses_BT, part.mask_BT, part.rollout
        )
        scores = replace(scores, future_BTM=heads[index][:, :width])
        loss, metrics = objective.loss(part, scores, denominators)
        total = total + loss
        for name, (value, weight) in metrics.items():
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + float(value), old[1] + float(weight))
    return total, sums


def naive(batch, heads, reduction) -> torch.Tensor:
    """Return the term, one token and one head at a time."""
    now = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout).logprobs_BT
    rows = []
    for b in range(B):
        length = int(MASK[b].sum())
        losses = [torch.zeros(()).double() for _ in range(length)]
        for n in range(1, M + 1):
            pairs = [
                (heads[b, t, n - 1] - batch.old_logprobs_BT[b, t + n], t) for t in range(length - n)
            ]
            moved = {t: (now[b, t + n] - batch.old_logprobs_BT[b, t + n]).item() for _, t in pairs}
            square = sum(x.item() ** 2 for x, _ in pairs) + 1e-8
            share = sum(x.item() * moved[t] for x, t in pairs) / square
            for x, t in pairs:
                gain = share * batch.advantages_BT[b, t + n].item()
                clipped = x.exp().clamp(1 - TERM.low, 1 + TERM.high)
                losses[t] = losses[t] - torch.minimum(x.exp() * gain, clipped * gain) / M
        if losses:
            rows.append(losses)
    if isinstance(reduction, TokenMean):
        return TERM.coef * sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    return TERM.coef * sum(sum(row) / len(row) for row in rows) / len(rows)


@pytest.mark.parametrize("reduction", [TokenMean(), SequenceMean()], ids=["tokens", "sequences"])
def test_it_equals_a_loop_and_does_not_depend_on_micro_batches(reduction):
    batch = experience()
    by_token = torch.randn(B, T, generator=seeded(4), dtype=torch.float64) * MASK
    batch = replace(batch, advantages_BT=by_token)
    heads = heads_of(batch).requires_grad_()
    plain = Objective(reduction=reduction)
    joint = replace(plain, terms=[TERM])
    base, _ = loss_of(plain, batch, heads)
    expected = naive(batch, heads, reduction)
    (expected_gradient,) = torch.autograd.grad(expected, heads)
    for parts in (None, [[0, 3], [1, 2, 5], [4, 6, 7]]):
        loss, _ = loss_of(joint, batch, heads, parts)
        torch.testing.assert_close(loss - base, expected, rtol=1e-6, atol=1e-9)
        (gradient,) = torch.autograd.grad(loss, heads)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
    assert expected_gradient.any()


@pytest.mark.parametrize("given", [False, True])
def test_the_first_update_on_a_rollout_is_that_without_heads(given):
    batch = experience(off_policy=False)
    if given:
        now = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout).logprobs_BT
        batch = replace(batch, old_logprobs_BT=now)
    heads = heads_of(batch).requires_grad_()
    loss, metrics = loss_of(Objective(terms=[TERM]), batch, heads)
    base, _ = loss_of(Objective(), batch, heads)
    assert loss == base
    assert not torch.autograd.grad(loss, heads)[0].any()
    assert metrics["heads/coefficient_1"][0] == 0


def test_heads_that_move_as_the_policy_count_fully():
    """Where `q_n` is the policy itself, every coefficient is 1."""
    batch = experience()
    now = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout).logprobs_BT
    same = torch.stack([pad(now[:, n:], (0, n)) for n in range(1, M + 1)], -1)
    _, metrics = loss_of(Objective(terms=[TERM]), batch, same)
    for n in (1, 2):
        value, weight = metrics[f"heads/coefficient_{n}"]
        assert value / weight == pytest.approx(1, abs=1e-4)
        assert weight == (MASK.sum(1) > n).sum()


def test_it_asks_for_heads_and_does_not_make_them_actions():
    objective = Objective(terms=[TERM])
    assert objective.request == ScoreRequest(future=M)
    assert objective.actions.future == 0
    metrics = loss_of(objective, experience(), heads_of(experience()))[1]
    assert "heads/cross_entropy_1" not in metrics
    assert math.isfinite(metrics["ratio/mean"][0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Objective(actions=BlockActions(source="mtp"), terms=[HeadPolicyLoss()]),
            "`HeadPolicyLoss` gives multi-token heads a loss of their own, and `BlockActions` has them in its ratios",
        ),
        (lambda: HeadPolicyLoss(offsets=0), "`HeadPolicyLoss.offsets` must be at least 1, got 0"),
        (
            lambda: HeadPolicyLoss(coef=-1.0),
            "`HeadPolicyLoss.coef` must be positive, got -1.0; leave it out of `terms` instead",
        ),
        (lambda: HeadPolicyLoss(low=1.0), r"`HeadPolicyLoss.low` must be in \(0, 1\), got 1.0"),
        (lambda: HeadPolicyLoss(high=0.0), "`HeadPolicyLoss.high` must be positive, got 0.0"),
    ],
)
def test_mistakes_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_heads_and_trunk_of_a_policy_learn_from_the_second_update_on(tmp_path):
    def run(folder, **axes):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return fit(
                tmp_path / folder,
                policy=make_policy(mtp=ParallelHeads(offsets=M)),
                objective=make_objective(**axes),
                rollout={"minibatches": 2},
                module={"optimizer": sgd()},
                max_steps=2,
            )

    joint, plain = run("joint", terms=[HeadPolicyLoss(M)]), run("plain")
    first, second = joint.record.column("heads/coefficient_1")
    assert first == 0
    assert second != 0
    moved = {
        name.split(".")[0]
        for name, weight in joint.weights.items()
        if not torch.equal(weight, plain.weights[name])
    }
    assert moved == {"mtp", "network"}
