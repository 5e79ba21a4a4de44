"""Metrics, the KL penalty, the entropy bonus and the description of an objective."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.functional.divergences import k1, k2, k3
from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.objective.advantages import LeaveOneOut
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare, GeometricDecay
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.supports import TopK
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.objective.terms import EntropyBonus
from tests.support.builders import relative_error, scores_of
from tests.support.objectives import (
    COMPOSITIONS,
    MASK,
    ON_POLICY,
    B,
    compose,
    each,
    experience,
    loss_and_gradient,
    row_weights,
    table,
)

# --- KL, entropy, metrics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize(
    "reduction", [TokenMean(), SequenceMean(), ConstantLength(12)], ids=lambda r: type(r).__name__
)
def test_the_kl_penalty_adds_its_gradient_through_the_same_reduction(estimator, reduction):
    batch = experience()
    plain = compose(reduction=reduction)
    penalised = replace(plain, terms=[KLPenalty(ConstantCoefficient(0.7), estimator, "loss")])
    with_kl, without = (loss_and_gradient(o, batch) for o in (penalised, plain))
    logits = table().requires_grad_()
    now = scores_of(logits, batch.rollout.responses_BT, MASK, batch.rollout).logprobs_BT
    gap = now - batch.reference_logprobs_BT
    naive = gap.square() / 2 if estimator == "k2" else (-gap).exp() + gap - 1
    expected = 0.7 * (naive * row_weights(plain, MASK) * MASK).sum()
    assert with_kl[0] - without[0] == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(with_kl[1] - without[1], torch.autograd.grad(expected, logits)[0]) < 1e-6


def test_kl_in_the_reward_or_merely_watched_adds_nothing_to_the_loss():
    batch = experience()
    plain = compose()
    in_reward = replace(plain, terms=[KLPenalty(ConstantCoefficient(0.7), "k1", "reward")])
    assert in_reward.changes_rewards
    assert not COMPOSITIONS["kl"].changes_rewards
    assert loss_and_gradient(in_reward, batch)[0] == loss_and_gradient(plain, batch)[0]
    assert torch.equal(loss_and_gradient(in_reward, batch)[1], loss_and_gradient(plain, batch)[1])
    bare = replace(batch, reference_logprobs_BT=None)
    assert loss_and_gradient(plain, bare)[0] == loss_and_gradient(plain, batch)[0]


def test_the_entropy_bonus_adds_the_entropys_gradient():
    batch, coefficient = experience(), 0.4
    plain = compose(reduction=SequenceMean())
    with_bonus = loss_and_gradient(replace(plain, terms=[EntropyBonus(coefficient)]), batch)
    without = loss_and_gradient(plain, batch)
    logits = table().requires_grad_()
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    expected = -coefficient * (entropy * row_weights(plain, MASK) * MASK).sum()
    assert with_bonus[0] - without[0] == pytest.approx(expected.item(), rel=1e-6)
    assert (
        relative_error(with_bonus[1] - without[1], torch.autograd.grad(expected, logits)[0]) < 1e-6
    )
    zero = loss_and_gradient(replace(plain, terms=[EntropyBonus(0.0)]), batch)
    assert zero[0] == without[0]


def test_metrics_are_what_they_say():
    batch, objective = experience(), compose(BlockActions(GeometricDecay(1.0), length=3, stride=3))
    metrics = {
        name: value / weight
        for name, (value, weight) in loss_and_gradient(objective, batch)[2].items()
    }
    scores = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout)
    ell = [(scores.logprobs_BT - batch.old_logprobs_BT)[b][MASK[b]].tolist() for b in range(B)]
    blocks = [
        (
            sum(row[s : s + 3]) / len(row[s : s + 3]),
            batch.advantages_BT[b, 0].item(),
            len(row[s : s + 3]),
        )
        for b, row in enumerate(ell)
        for s in range(0, len(row), 3)
    ]
    n, tokens = len(blocks), int(MASK.sum())
    exp = [torch.tensor(x).exp().item() for x, _, _ in blocks]
    clipped = [
        (r > 1.2 and a > 0) or (r < 0.8 and a < 0) for r, (_, a, _) in zip(exp, blocks, strict=True)
    ]
    assert metrics["ratio/mean"] == pytest.approx(sum(exp) / n, rel=1e-5)
    assert metrics["ratio/abs_log"] == pytest.approx(
        sum(abs(x) for x, _, _ in blocks) / n, rel=1e-5
    )
    assert metrics["ratio/tokens_per_action"] == pytest.approx(tokens / n)
    assert metrics["ratio/clip_fraction"] == pytest.approx(sum(clipped) / n)
    assert 0 < sum(clipped) < n
    assert metrics["policy/entropy"] == pytest.approx(
        scores.entropy_BT.sum().item() / tokens, rel=1e-6
    )
    zero = torch.zeros_like(scores.logprobs_BT)
    old = (
        k3(torch.where(MASK, scores.logprobs_BT - batch.old_logprobs_BT, zero), zero).sum().item()
        / tokens
    )
    assert metrics["kl/old"] == pytest.approx(old, rel=1e-6)
    reference = k3(scores.logprobs_BT, batch.reference_logprobs_BT)[MASK].mean().item()
    assert metrics["kl/reference"] == pytest.approx(reference, rel=1e-6)
    assert k1(zero, zero).sum() == k2(zero, zero).sum() == 0


@each
def test_metrics_carry_no_gradient(objective):
    batch = experience()
    scores = scores_of(table().requires_grad_(), batch.rollout.responses_BT, MASK, batch.rollout)
    metrics = objective.loss(batch, scores, objective.denominators(batch))[1]
    assert not any(part.requires_grad for pair in metrics.values() for part in pair)


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ON_POLICY.values(), ids=ON_POLICY)
def test_describe_names_every_axis_and_its_choice(objective):
    text = objective.describe()
    assert "\n" not in text
    for part, axis in zip(text.split(" | "), Objective.__dataclass_fields__, strict=True):
        name, rest = part.split(" ", 1)
        assert name == axis
        choice = getattr(objective, axis)
        choice = (choice or [None])[0] if axis == "terms" else choice
        assert rest.split("(")[0] == ("none" if choice is None else type(choice).__name__)


def test_describe_shows_the_arguments():
    objective = replace(
        COMPOSITIONS["everything"],
        surrogate=ClippedRatio(3e-4, 0.28, dual=3.0),
        support=TopK(8),
        advantage=LeaveOneOut(),
    )
    text = objective.describe()
    for words in (
        "support TopK(k=8, from_reference=False, outside='refuse', within=None)",
        "weights=FutureShare(share=0.2), length=3, stride=1, tail=None, source='backbone', ratio='weighted'",
        "advantage LeaveOneOut() |",
        "ClippedRatio(low=0.0003, high=0.28, dual=3.0)",
        "EntropyBonus(coef=0.2)",
        "KLPenalty(controller=ConstantCoefficient(coefficient=0.3), estimator='k3', place='loss', level='token')",
    ):
        assert words in text


def test_a_surrogate_of_token_probabilities_is_refused_over_other_actions():
    class NeedsTokens(ClippedRatio):
        needs_token_actions = True

    NeedsTokens.__module__ = "tests"
    compose(surrogate=NeedsTokens())
    for actions in (SequenceActions(), BlockActions(FutureShare(), length=3)):
        message = f"`NeedsTokens` needs probabilities of single tokens and has no meaning over `{type(actions).__name__}`"
        with pytest.raises(UserError, match=message):
            compose(actions, NeedsTokens())
