"""Prefix trees through the composed loss (T-SPMO): each distinct token of a prefix counts once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.advantages import at_last_token
from lightning_mpo.objective.advantages import PrefixTree
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.types import Experience, take_rows
from tests.support.builders import relative_error, scores_of, seeded
from tests.support.token_credit import (
    MASK,
    PARTS,
    VALID,
    B,
    T,
    compose,
    experience,
    loss_and_gradient,
    table,
)

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
