"""Weights of single tokens through the composed loss: sampled tokens (S-GRPO), prefix trees (T-SPMO), corrections.

The policy of these tests is a table of logits `[B, T, V]` in float64; docs/algorithms.md 16.5 numbers the invariants.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.advantages import at_last_token
from lightning_mpo.objective.action_spaces import TokenActions
from lightning_mpo.objective.advantages import GroupRelative, Outcome, PrefixTree
from lightning_mpo.objective.corrections import MaskedWeights, TruncatedWeights
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.selection import AllTokens, HighEntropyTokens, SampledTokens
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.surrogates import ClippedRatio, PolicyGradient
from lightning_mpo.objective.terms import EntropyBonus
from lightning_mpo.types import Experience, take_rows, trim
from tests.support.builders import VOCABULARY as V
from tests.support.builders import make_experience, relative_error, right_padded, scores_of, seeded

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


def chosen_by(selection, mask: Tensor, uniform: Tensor) -> Tensor:
    """Return the weights that a selection gives for these uniform numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, generator: uniform)
        return selection.choose(mask, seeded(0))


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
            if objective.selection.of_whole
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
    if objective.kl is not None:
        total = total + 0.3 * naive_mean(objective.reduction, penalties, whole)
    if objective.bonus is not None:
        total = total - objective.bonus.coef * naive_mean(objective.reduction, entropies, whole)
    return total


# --- sampled tokens -------------------------------------------------------------------------------------------------

SELECTIONS = {
    "scan": SampledTokens(prefix=2, cap=4, probability=0.5),
    "uniform": SampledTokens(prefix=0, cap=3, probability=0.6, cap_mode="uniform"),
    "unbiased": SampledTokens(prefix=1, cap=None, probability=0.4, unbiased=True),
    "entropy": HighEntropyTokens(0.4),
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize(
    "surrogate", [PolicyGradient(), ClippedRatio()], ids=lambda s: type(s).__name__
)
@each_reduction
def test_loss_and_gradient_equal_a_loop_over_chosen_tokens(selection, surrogate, reduction):
    entropy = torch.rand(MASK.shape, generator=seeded(5))
    weights = selection.choose(MASK, seeded(4), entropy)
    assert 0 < (weights > 0).sum() < MASK.sum()
    batch = experience(weights)
    objective = compose(selection, surrogate, reduction, kl=KL, bonus=EntropyBonus(0.1))
    logits = table().requires_grad_()
    expected = naive_loss(objective, batch, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    for parts in (None, *PARTS):
        loss, gradient = loss_and_gradient(objective, batch, parts)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert relative_error(gradient, expected_gradient) < 1e-6
    assert not gradient[weights == 0].any()


def test_with_every_token_chosen_s_grpo_is_grpo_on_the_policy_that_sampled():  # invariant 1
    selection = SampledTokens(prefix=0, cap=None, probability=1.0)
    batch = experience(selection.choose(MASK, seeded(0)))
    on_policy = replace(batch, old_logprobs_BT=None)
    s_grpo = compose(selection, PolicyGradient(), SequenceMean())
    grpo = compose(AllTokens(), ClippedRatio(), SequenceMean())
    ours, theirs = (loss_and_gradient(o, on_policy)[1] for o in (s_grpo, grpo))
    assert relative_error(ours, theirs) < 1e-12
    fewer = replace(on_policy, token_weights_BT=SELECTIONS["scan"].choose(MASK, seeded(0)))
    assert relative_error(loss_and_gradient(s_grpo, fewer)[1], theirs) > 0.1


@each_reduction
@pytest.mark.parametrize(
    "surrogate", [PolicyGradient(), ClippedRatio()], ids=lambda s: type(s).__name__
)
def test_the_expected_unbiased_loss_and_gradient_are_those_of_all_tokens(
    reduction, surrogate
):  # invariant 3
    """All masks of two short rows, each with its probability; some leave a row without any token."""
    mask, probability = right_padded([4, 2], 4), 0.3
    for prefix in (0, 1):
        selection = SampledTokens(prefix=prefix, cap=None, probability=probability, unbiased=True)
        batch = experience(mask.float(), mask, torch.tensor([True, True]))
        terms = {"kl": KL, "bonus": EntropyBonus(0.1)}
        wanted = loss_and_gradient(compose(AllTokens(), surrogate, reduction, **terms), batch)
        objective = compose(selection, surrogate, reduction, **terms)
        later = [(b, t) for b, t in mask.nonzero().tolist() if t >= prefix]
        loss, gradient, mass = 0.0, torch.zeros_like(wanted[1]), 0.0
        for kept in itertools.product([False, True], repeat=len(later)):
            uniform = torch.full(mask.shape, 0.99)
            for (b, t), keep in zip(later, kept, strict=True):
                uniform[b, t] = 0.0 if keep else 0.99
            chance = probability ** sum(kept) * (1 - probability) ** (len(kept) - sum(kept))
            weights = chosen_by(selection, mask, uniform)
            part = loss_and_gradient(objective, replace(batch, token_weights_BT=weights))
            loss, gradient, mass = (
                loss + chance * part[0],
                gradient + chance * part[1],
                mass + chance,
            )
        assert mass == pytest.approx(1)
        assert loss == pytest.approx(wanted[0], rel=1e-6)
        assert relative_error(gradient, wanted[1]) < 1e-6


# --- prefix trees ---------------------------------------------------------------------------------------------------

GROUP = 4


def tree_experience(
    tree: PrefixTree, seed: int = 0, order: list[int] | None = None
) -> tuple[Experience, Tensor]:
    """Return an experience of two groups of few distinct tokens, and its rewards; row 4 is not valid."""
    tokens = torch.randint(0, 2, (B, T), generator=seeded(seed))
    rewards = torch.randn(B, generator=seeded(seed + 1), dtype=torch.float64).masked_fill(
        ~VALID, torch.nan
    )
    batch = experience()
    batch = replace(
        batch,
        rollout=replace(batch.rollout, tokens_BL=torch.cat([torch.ones(B, 1).long(), tokens], 1)),
    )
    if order is not None:
        batch, rewards = take_rows(batch, torch.tensor(order)), rewards[order]
    mask, valid = batch.rollout.response_mask_BT, batch.valid_B
    rewards_BT = at_last_token(rewards, mask)  # a response without tokens has nowhere to put one
    estimate = tree.estimate(
        Outcome(rewards_BT, mask, GROUP, valid, None, batch.rollout.responses_BT)
    )
    batch = replace(
        batch, advantages_BT=estimate.advantages_BT, token_weights_BT=estimate.weights_BT
    )
    return batch, rewards_BT.sum(1)


def naive_tree_loss(batch: Experience, rewards: Tensor, logits: Tensor, count: bool) -> Tensor:
    """-(1/|U|) Σ over the distinct pairs (p, v) of branching prefixes of A(v | p)·log π(v | p), with dictionaries."""
    pairs: dict[tuple, list[int]] = {}
    passing: dict[tuple, list[int]] = {}
    for b in [b for b in range(B) if batch.valid_B[b]]:
        row = batch.rollout.responses_BT[b][batch.rollout.response_mask_BT[b]].tolist()
        for t in range(len(row) + 1):
            prefix = (b // GROUP, *row[:t])
            passing.setdefault(prefix, []).append(b)
            pairs.setdefault((prefix, row[t] if t < len(row) else None), []).append(b)
    total, number = torch.zeros(()).double(), 0.0
    for (prefix, token), rows in pairs.items():
        if token is None or sum(other[0] == prefix for other in pairs) < 2:
            continue
        gain = rewards[rows].mean() - rewards[passing[prefix]].mean()
        t = len(prefix) - 1
        logprobs = [logits[b, t].log_softmax(0)[token] - batch.old_logprobs_BT[b, t] for b in rows]
        total = total - gain * (sum(logprobs) if count else sum(logprobs) / len(rows))
        number += len(rows) if count else 1
    return total / number


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("seed", [0, 5, 7])
def test_a_prefix_tree_is_a_sum_over_distinct_pairs(count, seed):
    batch, rewards = tree_experience(PrefixTree(count), seed)
    objective = compose(advantage=PrefixTree(count))
    logits = table().requires_grad_()
    expected = naive_tree_loss(batch, rewards, logits, count)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    for parts in (None, *PARTS):
        loss, gradient = loss_and_gradient(objective, batch, parts)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert relative_error(gradient, expected_gradient) < 1e-6
    assert not gradient[~VALID].any()
    assert 0 < batch.mask_BT.sum() < MASK.sum()
    copies = batch.token_weights_BT[batch.mask_BT].unique()
    assert torch.equal(copies, torch.ones(1).double()) if count else len(copies) > 1


def test_the_order_of_a_group_changes_no_loss_of_a_tree():  # invariant 8
    order = [2, 0, 3, 1, 7, 5, 4, 6]
    (batch, rewards), (moved, moved_rewards) = (
        tree_experience(PrefixTree()),
        tree_experience(PrefixTree(), order=order),
    )
    logits = table().requires_grad_()
    objective, results = compose(advantage=PrefixTree()), []
    for part, rows in ((batch, list(range(B))), (moved, order)):
        scores = scores_of(logits[rows], part.rollout.responses_BT, part.mask_BT)
        results.append(objective.loss(part, scores, objective.denominators(part))[0])
    assert torch.equal(moved_rewards.isnan(), rewards[order].isnan())
    assert results[1].item() == pytest.approx(results[0].item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in results]
    assert relative_error(gradients[1], gradients[0]) < 1e-6


def test_equal_completions_teach_a_tree_nothing_and_different_first_tokens_all_there_is():  # invariant 7
    tree, mask = PrefixTree(), torch.ones(B, T, dtype=torch.bool)
    objective, rewards = compose(advantage=tree), torch.arange(float(B)).double()
    batch = experience(mask=mask, valid=torch.ones(B, dtype=torch.bool))
    tokens = torch.full((B, T), 3)
    for first in (tokens[:, 0], torch.arange(B)):
        tokens[:, 0] = first
        estimate = tree.estimate(
            Outcome(at_last_token(rewards, mask), mask, GROUP, batch.valid_B, None, tokens)
        )
        learnt = replace(
            batch, advantages_BT=estimate.advantages_BT, token_weights_BT=estimate.weights_BT
        )
        gradient = loss_and_gradient(objective, learnt)[1]
        assert not gradient[:, 1:].any()
    plain = replace(
        batch,
        advantages_BT=(
            rewards.view(-1, GROUP) - rewards.view(-1, GROUP).mean(1, keepdim=True)
        ).view(B, 1)
        * mask,
    )
    expected = loss_and_gradient(
        compose(), replace(plain, token_weights_BT=torch.eye(1, T).expand(B, T))
    )[1]
    assert relative_error(gradient[:, 0], expected[:, 0]) < 1e-6
    same = tree.estimate(
        Outcome(
            at_last_token(rewards, mask), mask, GROUP, batch.valid_B, None, torch.full((B, T), 3)
        )
    )
    nothing = replace(batch, advantages_BT=same.advantages_BT, token_weights_BT=same.weights_BT)
    assert loss_and_gradient(objective, nothing)[0] == 0
    assert not loss_and_gradient(objective, nothing)[1].any()


# --- corrections ----------------------------------------------------------------------------------------------------

CORRECTIONS = [
    TruncatedWeights("token", cap=1.3),
    TruncatedWeights("sequence", cap=1.3),
    MaskedWeights("token", cap=1.3, low=0.6),
    MaskedWeights("sequence", cap=1.5),
]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: f"{type(c).__name__}-{c.level}")
@each_reduction
def test_corrected_losses_equal_a_loop_and_denominators_stay(correction, reduction):
    batch = experience()
    behaviour = batch.old_logprobs_BT + 0.4 * torch.randn(
        B, T, generator=seeded(6), dtype=torch.float64
    )
    corrected = replace(
        batch, correction_BT=correction.weights(batch.old_logprobs_BT, behaviour, MASK)
    )
    objective = compose(surrogate=ClippedRatio(), reduction=reduction, correction=correction, kl=KL)
    assert objective.denominators(corrected) == objective.denominators(batch)
    logits = table().requires_grad_()
    expected = naive_loss(objective, corrected, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    for parts in (None, *PARTS):
        loss, gradient = loss_and_gradient(objective, corrected, parts)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert relative_error(gradient, expected_gradient) < 1e-6
    assert relative_error(loss_and_gradient(objective, batch)[1], expected_gradient) > 0.01


def test_metrics_of_a_correction_are_what_they_say():
    correction = MaskedWeights("token", cap=1.2)
    batch = experience()
    behaviour = batch.old_logprobs_BT + 0.4 * torch.randn(
        B, T, generator=seeded(6), dtype=torch.float64
    )
    weights = correction.weights(batch.old_logprobs_BT, behaviour, MASK)
    batch = replace(batch, correction_BT=weights)
    objective = compose(surrogate=ClippedRatio(), correction=correction)
    scores = scores_of(table(), batch.rollout.responses_BT, batch.mask_BT)
    metrics = objective.loss(batch, scores, objective.denominators(batch))[1]
    counted = [weights[b, t].item() for b, t in (MASK & VALID[:, None]).nonzero().tolist()]
    value, number = metrics["correction/weight"]
    assert value.item() / number.item() == pytest.approx(sum(counted) / len(counted))
    value, number = metrics["correction/masked"]
    assert value.item() / number.item() == pytest.approx(counted.count(0.0) / len(counted))
    assert 0 < counted.count(0.0) < len(counted)
