"""The critic's loss inside the objective: a naive loop, the same reduction as every other term, and what it measures.

Policy and critic are tables in float64: logits `[B, T, V]` and values `[B, T]`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import TokenActions
from lightning_mpo.objective.advantages import GeneralizedAdvantage, GroupRelative
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.selection import AllTokens
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.types import Experience, take_rows, trim
from tests.support.builders import VOCABULARY, make_experience, right_padded, scores_of, seeded

MASK = right_padded([7, 3, 1, 9, 5, 4, 0, 6], 10)
B, T = MASK.shape
REDUCTIONS = [TokenMean(), SequenceMean(), ConstantLength(12)]
each_reduction = pytest.mark.parametrize(
    "reduction", REDUCTIONS, ids=lambda reduction: type(reduction).__name__
)


def compose(critic: ValueLoss | None = ValueLoss(0.3, 0.2), **axes) -> Objective:  # noqa: B008  frozen
    advantage = GroupRelative() if critic is None else GeneralizedAdvantage()
    parts = {"actions": TokenActions(), "advantage": advantage, "reduction": TokenMean()} | axes
    return Objective(
        FullVocabulary(),
        surrogate=ClippedRatio(),
        selection=AllTokens(),
        terms=[critic] if critic else [],
        **parts,
    )


def random(seed: int) -> Tensor:
    return torch.randn(B, T, generator=seeded(seed), dtype=torch.float64)


def logits() -> Tensor:
    return torch.randn(B, T, VOCABULARY, generator=seeded(0), dtype=torch.float64)


def experience(mask: Tensor = MASK, **fields) -> Experience:
    batch = make_experience(mask, random(1) * mask, **fields)
    now = scores_of(logits(), batch.rollout.responses_BT, mask).logprobs_BT
    old = torch.where(mask, now + 0.3 * random(2), 0.0)
    return replace(
        batch, old_logprobs_BT=old, values_BT=random(3) * mask, returns_BT=random(4) * mask
    )


def run(objective: Objective, batch: Experience, parts: list[list[int]] | None = None):
    """Return the loss, the gradients of logits and values, and the sums of the metrics."""
    tables = logits().requires_grad_(), (random(3) + 0.3 * random(5)).requires_grad_()
    denominators, total, sums = objective.denominators(batch), torch.zeros(()).double(), {}
    for rows in parts or [list(range(B))]:
        index = torch.tensor(rows)
        part = trim(take_rows(batch, index))
        width = part.mask_BT.shape[1]
        scores = scores_of(tables[0][index][:, :width], part.rollout.responses_BT, part.mask_BT)
        values = torch.where(part.mask_BT, tables[1][index][:, :width], 0.0)
        loss, metrics = objective.loss(part, replace(scores, values_BT=values), denominators)
        total = total + loss
        for name, (value, weight) in metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + float(value), before[1] + float(weight))
    return total.item(), *torch.autograd.grad(total, tables, allow_unused=True), sums


def naive(critic: ValueLoss, reduction, batch: Experience, values: Tensor) -> Tensor:
    """Reduce the errors of one token at a time."""
    rows = []
    for b in range(B):
        row = []
        for t in range(T):
            if not batch.mask_BT[b, t]:
                continue
            value, old, target = values[b, t], batch.values_BT[b, t], batch.returns_BT[b, t]
            error = (value - target) ** 2
            if critic.clip is not None:
                moved = old + min(
                    max(value - old, torch.tensor(-critic.clip)), torch.tensor(critic.clip)
                )
                error = max(error, (moved - target) ** 2)
            row.append(error / 2)
        rows += [row] if row else []
    if isinstance(reduction, SequenceMean):
        return critic.coef * sum(sum(row) / len(row) for row in rows) / len(rows)
    total = sum(sum(row) for row in rows)
    return (
        critic.coef
        * total
        / (sum(map(len, rows)) if isinstance(reduction, TokenMean) else 12 * len(rows))
    )


@each_reduction
@pytest.mark.parametrize("clip", [None, 0.1, 0.5])
@pytest.mark.parametrize(
    "actions", [TokenActions(), BlockActions(FutureShare(0.3), length=3)], ids=["token", "block"]
)
def test_the_critic_adds_its_loop_through_the_same_reduction(reduction, clip, actions):
    critic, batch = ValueLoss(0.3, clip), experience()
    with_critic = run(compose(critic, reduction=reduction, actions=actions), batch)
    without = run(compose(None, reduction=reduction, actions=actions), batch)
    values = (random(3) + 0.3 * random(5)).requires_grad_()
    expected = naive(critic, reduction, batch, values)
    (gradient,) = torch.autograd.grad(expected, values)
    assert with_critic[0] - without[0] == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(with_critic[2], gradient, rtol=1e-6, atol=1e-12)
    assert torch.equal(with_critic[1], without[1]), "the critic is a table of its own here"
    assert without[2] is None


@each_reduction
@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5, 6, 7]], [[6], [7, 0, 3], [1, 2, 5, 4]]])
def test_micro_batches_add_up(reduction, parts):
    whole, split = (run(compose(reduction=reduction), experience(), p) for p in (None, parts))
    assert split[0] == pytest.approx(whole[0], rel=1e-9)
    torch.testing.assert_close(split[2], whole[2])
    for name, pair in whole[3].items():
        assert split[3][name] == pytest.approx(pair, rel=1e-5, abs=1e-9) or name.startswith(
            "loss/"
        ), name


@pytest.mark.parametrize("how", ["invalid", "deselected"])
def test_rows_that_do_not_count_change_nothing_whatever_is_in_them(how):
    counted = torch.tensor([True, True, False, True, True, False, True, True])
    poison = torch.where(counted[:, None], 0.0, torch.tensor(float("nan"), dtype=torch.float64))
    whole = experience()
    poisoned = replace(
        whole, values_BT=whole.values_BT + poison, returns_BT=whole.returns_BT + poison
    )
    fields = (
        {"valid_B": counted}
        if how == "invalid"
        else {"token_weights_BT": whole.token_weights_BT * counted[:, None]}
    )
    got = run(compose(), replace(poisoned, **fields))
    expected = run(compose(), replace(whole, **fields))
    assert got[0] == pytest.approx(expected[0], rel=1e-9)
    assert torch.equal(got[2], expected[2])
    assert not got[2][~counted].any()
    assert got[2][counted & MASK.any(1)].any(1).all()
    for name, pair in expected[3].items():
        assert got[3][name] == pytest.approx(pair), name


def test_the_clip_lets_no_gradient_through_where_it_holds():
    got = run(compose(ValueLoss(1.0, 0.2)), experience())
    batch, values = experience(), random(3) + 0.3 * random(5)
    moved = values - batch.values_BT
    nearer = (values - batch.returns_BT).abs() < (
        batch.values_BT + moved.clamp(-0.2, 0.2) - batch.returns_BT
    ).abs()
    stopped = MASK & nearer & (moved.abs() > 0.2)
    assert 3 < stopped.sum() < MASK.sum() / 2
    assert not got[2][stopped].any()
    assert got[2][MASK & ~stopped].abs().min() > 0


def test_metrics_are_what_they_say():
    critic, batch = ValueLoss(0.3, 0.2), experience()
    metrics = {
        name: value / weight for name, (value, weight) in run(compose(critic), batch)[3].items()
    }
    values, returns, old = (
        part[MASK] for part in (random(3) + 0.3 * random(5), batch.returns_BT, batch.values_BT)
    )
    assert metrics["value/error"] == pytest.approx(
        (values - returns).square().mean().item(), rel=1e-6
    )
    assert metrics["value/mean"] == pytest.approx(values.mean().item(), rel=1e-6)
    assert metrics["value/return"] == pytest.approx(returns.mean().item(), rel=1e-6)
    clipped = (old + (values - old).clamp(-0.2, 0.2) - returns).abs() > (values - returns).abs()
    assert metrics["value/clip_fraction"] == pytest.approx(clipped.double().mean().item())
    assert 0 < clipped.double().mean() < 1
    finished = critic.finish(metrics)
    explained = 1 - ((returns - values).var(correction=0) / returns.var(correction=0)).item()
    assert finished["value/explained_variance"] == pytest.approx(explained, rel=1e-5)
    assert finished["ratio/mean"] == metrics["ratio/mean"]
    assert "value/return_square" not in finished
    assert "value/clip_fraction" not in run(compose(ValueLoss(0.3, None)), batch)[3]


def test_an_objective_with_a_critic_asks_for_values():
    assert compose().request.values
    assert not compose(None).request.values
    with pytest.raises(RuntimeError, match="values and returns"):
        run(compose(), replace(experience(), returns_BT=None))


def test_refusals():
    with pytest.raises(
        UserError, match=r"`GeneralizedAdvantage` takes a critic's values; add `ValueLoss`"
    ):
        compose(None, advantage=GeneralizedAdvantage())
    with pytest.raises(
        UserError,
        match="`ValueLoss` fits values that `GroupRelative` does not use; take it out",
    ):
        compose(advantage=GroupRelative())
    with pytest.raises(UserError, match="`ValueLoss.clip` must be positive, got 0"):
        ValueLoss(clip=0.0)
    with pytest.raises(UserError, match="`ValueLoss.coef` must not be negative, got -1"):
        ValueLoss(coef=-1.0)
