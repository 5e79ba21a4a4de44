"""Laws of every selection: which tokens carry gradient."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lightning_mpo.functional.advantages import at_last_token
from lightning_mpo.functional.prefix_tree import prefix_tree
from lightning_mpo.objective.advantages import PrefixTree
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.objective.selection import AllTokens, HighEntropyTokens, SampledTokens, Selection
from lightning_mpo.objective.surrogates import PolicyGradient
from tests.support.builders import make_experience, right_padded, scores_of, seeded, subclasses
from tests.support.runs import make_objective

SELECTIONS = [
    AllTokens(),
    SampledTokens(prefix=2, cap=4, probability=0.5),
    SampledTokens(prefix=0, cap=3, probability=0.5, cap_mode="uniform"),
    SampledTokens(prefix=1, cap=None, probability=0.4, unbiased=True),
    HighEntropyTokens(0.4),
]
each = pytest.mark.parametrize(
    "selection", SELECTIONS, ids=lambda s: f"{type(s).__name__}{list(vars(s).values())}"
)
MASK = right_padded([5, 0, 8, 1, 3])
ENTROPY = torch.rand(MASK.shape, generator=seeded(5))


def test_the_list_has_every_selection():
    assert subclasses(Selection) == {type(s) for s in SELECTIONS}


@each
def test_only_response_tokens_are_chosen_with_the_same_generator_the_same_ones(selection):
    before = MASK.clone()
    weights = selection.choose(MASK, seeded(0), ENTROPY)
    assert weights.is_floating_point()
    assert (weights >= 0).all()
    assert not weights[~MASK].any()
    assert torch.equal(selection.choose(MASK, seeded(0), ENTROPY), weights)
    assert torch.equal(MASK, before)


def test_all_tokens_weigh_one():
    assert torch.equal(AllTokens().choose(MASK, seeded(0)), MASK.float())


# --- through the loss -----------------------------------------------------------------------------------------------

ROWS = right_padded([3, 1, 4])
LOGITS = torch.randn(*ROWS.shape, 19, generator=seeded(6), dtype=torch.float64)
ADVANTAGES = torch.randn(3, 1, generator=seeded(7), dtype=torch.float64).expand(ROWS.shape) * ROWS
REDUCTIONS = [TokenMean(), SequenceMean(), ConstantLength(6)]


def loss_and_gradient(weights: torch.Tensor, **axes) -> tuple[torch.Tensor, torch.Tensor]:
    objective = make_objective(surrogate=PolicyGradient(), **axes)
    batch = make_experience(ROWS, ADVANTAGES, weights=weights)
    logits = LOGITS.clone().requires_grad_()
    loss, _ = objective.loss(
        batch,
        scores_of(logits, batch.rollout.responses_BT, batch.mask_BT),
        objective.denominators(batch),
    )
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda r: type(r).__name__)
def test_the_expected_gradient_of_an_unbiased_sample_is_that_of_all_tokens(reduction):
    """Exactly: the sum over all samples of a batch, each times its probability (docs/algorithms.md 16.5, invariant 3)."""
    selection = SampledTokens(prefix=1, cap=None, probability=0.4, unbiased=True)
    late = (ROWS.cumsum(1) > 1) & ROWS
    places = late.nonzero().tolist()
    expected = torch.zeros_like(LOGITS)
    total = 0.0
    for chosen in itertools.product((False, True), repeat=len(places)):
        weights, probability = (ROWS & ~late).double(), 1.0
        for (b, t), kept in zip(places, chosen, strict=True):
            weights[b, t] = 1 / 0.4 if kept else 0.0
            probability *= 0.4 if kept else 0.6
        expected += (
            probability * loss_and_gradient(weights, selection=selection, reduction=reduction)[1]
        )
        total += probability
    assert total == pytest.approx(1.0)
    whole = loss_and_gradient(ROWS.double(), selection=AllTokens(), reduction=reduction)[1]
    torch.testing.assert_close(expected, whole)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda r: type(r).__name__)
def test_choosing_everything_is_choosing_nothing(reduction):
    """P = 1, alpha = 0, no cap: on-policy GRPO (docs/algorithms.md 16.5, invariant 1)."""
    selection = SampledTokens(prefix=0, cap=None, probability=1.0)
    weights = selection.choose(ROWS, seeded(0))
    whole = loss_and_gradient(ROWS.double(), selection=AllTokens(), reduction=reduction)
    for value, expected in zip(
        loss_and_gradient(weights, selection=selection, reduction=reduction), whole, strict=True
    ):
        torch.testing.assert_close(value, expected)


def test_a_sample_is_averaged_over_the_tokens_that_were_chosen():
    """1 / |T_i| of S-GRPO: token by token, row by row."""
    weights = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    loss, _ = loss_and_gradient(weights, selection=SampledTokens(), reduction=SequenceMean())
    tokens = make_experience(ROWS, ADVANTAGES).rollout.responses_BT
    assert loss.item() == pytest.approx(0.0)  # log-ratios are 0 where the policy is its own anchor
    expected = -(ADVANTAGES * weights / weights.sum(1, keepdim=True) / 3)
    leaf = LOGITS.clone().requires_grad_()
    wanted = torch.autograd.grad(
        (expected * scores_of(leaf, tokens, weights > 0).logprobs_BT).sum(), leaf
    )[0]
    got = loss_and_gradient(weights, selection=SampledTokens(), reduction=SequenceMean())[1]
    torch.testing.assert_close(got, wanted)


def test_a_prefix_tree_counts_each_branch_once():
    """J = 1/|U| sum over distinct pairs at branches (docs/algorithms.md 4.6), against a loop over prefixes."""
    tokens = torch.tensor([[5, 6, 7, 1], [5, 6, 8, 1], [5, 9, 1, 0], [5, 6, 7, 1]])
    mask, rewards = (
        right_padded([4, 4, 3, 4]),
        torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64),
    )
    advantage = PrefixTree()
    estimate = advantage.estimate(
        Outcome(
            at_last_token(rewards, mask), mask, 4, torch.ones(4, dtype=torch.bool), None, tokens
        )
    )
    values: dict[tuple, list[float]] = {}
    rows = [tokens[b][mask[b]].tolist() for b in range(4)]
    for row, reward in zip(rows, rewards.tolist(), strict=True):
        for t in range(len(row) + 1):
            values.setdefault(tuple(row[:t]), []).append(reward)
    mean = {prefix: sum(given) / len(given) for prefix, given in values.items()}
    branches = {p: {q[-1] for q in mean if len(q) == len(p) + 1 and q[:-1] == p} for p in mean}
    pairs = [(p, v) for p, tails in branches.items() if len(tails) > 1 for v in tails]
    logits = torch.randn(4, 4, 19, generator=seeded(8), dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    terms = []
    for prefix, token in pairs:
        b = next(
            b for b, row in enumerate(rows) if tuple(row[: len(prefix) + 1]) == (*prefix, token)
        )
        score = leaf[b, len(prefix)].log_softmax(0)[token]
        terms.append((mean[(*prefix, token)] - mean[prefix]) * score)
    wanted = torch.autograd.grad(-sum(terms) / len(pairs), leaf)[0]
    # rows that share a prefix have logits of their own here: put those of a pair's other rows onto the first one
    objective = make_objective(
        surrogate=PolicyGradient(), advantage=advantage, reduction=TokenMean()
    )
    batch = make_experience(mask, estimate.advantages_BT, weights=mask * estimate.weights_BT)
    batch = replace(
        batch, rollout=replace(batch.rollout, tokens_BL=torch.cat([tokens[:, :1], tokens], 1))
    )
    leaf = logits.clone().requires_grad_()
    shared = leaf.clone()
    for b, row in enumerate(rows):
        for t in range(len(row)):
            first = next(c for c, other in enumerate(rows) if other[: t + 1] == row[: t + 1])
            shared[b, t] = leaf[first, t]
    loss, _ = objective.loss(
        batch, scores_of(shared, tokens, batch.mask_BT), objective.denominators(batch)
    )
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], wanted)
    assert batch.token_weights_BT.sum().item() == pytest.approx(len(pairs))


def test_rows_without_a_reward_stand_outside_of_the_tree():
    tokens = torch.randint(2, 4, (8, 5), generator=seeded(9))
    mask, rewards = (
        right_padded([5, 3, 4, 5, 2, 5, 1, 4]),
        torch.randn(8, generator=seeded(10), dtype=torch.float64),
    )
    valid = torch.tensor([True, False, True, True, True, True, False, True])
    advantages, weights = prefix_tree(
        tokens, mask, rewards.masked_fill(~valid, float("nan")), 4, valid_B=valid
    )
    assert not advantages[~valid].any()
    assert not weights[~valid].any()
    for group in (slice(0, 4), slice(4, 8)):
        kept = valid[group]
        alone = prefix_tree(
            tokens[group][kept], mask[group][kept], rewards[group][kept], int(kept.sum())
        )
        torch.testing.assert_close(advantages[group][kept], alone[0])
        torch.testing.assert_close(weights[group][kept], alone[1])
    assert advantages.any()


def test_counted_branches_weigh_one_per_completion():
    tokens, mask = torch.tensor([[5], [5], [6]]), torch.ones(3, 1, dtype=torch.bool)
    estimate = PrefixTree(count=True).estimate(
        Outcome(
            torch.tensor([[1.0], [0.0], [0.0]]),
            mask,
            3,
            torch.ones(3, dtype=torch.bool),
            None,
            tokens,
        )
    )
    assert estimate.weights_BT.tolist() == [[1.0], [1.0], [1.0]]
    once = PrefixTree().estimate(
        Outcome(
            torch.tensor([[1.0], [0.0], [0.0]]),
            mask,
            3,
            torch.ones(3, dtype=torch.bool),
            None,
            tokens,
        )
    )
    assert once.weights_BT.tolist() == [[0.5], [0.5], [1.0]]
