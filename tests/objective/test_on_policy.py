"""On policy, each algorithm is REINFORCE with its own reduction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.objective.action_spaces import SegmentActions, SequenceActions, TokenActions
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.supports import TopK
from lightning_mpo.types import Experience
from tests.support.builders import VOCABULARY as V
from tests.support.builders import relative_error, scores_of
from tests.support.objectives import (
    ALGORITHMS,
    MASK,
    ON_POLICY,
    SEGMENTS,
    B,
    T,
    each,
    experience,
    from_yaml,
    loss_and_gradient,
    row_weights,
    table,
)


def token_coefficients(objective: Objective, mask: Tensor) -> Tensor:
    """Return by how much each token's score counts on-policy, before the reduction (docs/algorithms.md 3.4)."""
    actions, coefficients = objective.actions, mask.double()
    for b, length in enumerate(mask.sum(1).tolist()):
        if isinstance(actions, SequenceActions):
            coefficients[b, :length] = 1.0 if actions.mean else float(length)
        elif isinstance(actions, SegmentActions):
            ids = SEGMENTS[b, :length].tolist()
            coefficients[b, :length] = torch.tensor(
                [1.0 if actions.ratio == "mean" else ids.count(i) for i in ids]
            )
        elif isinstance(actions, BlockActions):
            beta = actions.weights_N
            renorm = actions.tail == "renorm" or (actions.tail is None and actions.stride > 1)
            coefficients[b] = 0
            for start in range(0, length, actions.stride):
                alive = min(actions.length, length - start)
                stands_for = min(actions.stride, length - start)
                scale = sum(beta) / sum(beta[:alive]) if renorm else 1.0
                for n in range(alive):
                    coefficients[b, start + n] += stands_for * scale * beta[n]
    return coefficients


def on_policy_gradient(objective: Objective, batch: Experience) -> Tensor:
    """Return the gradient of the objective's loss where its support holds the whole vocabulary."""
    support = TopK(V) if isinstance(objective.support, TopK) else objective.support
    objective = replace(objective, support=support)
    logits = table().requires_grad_()
    tokens, mask = batch.rollout.responses_BT, batch.mask_BT
    support_NK, slots_NK = support.select(logits.detach().flatten(0, 1))
    if support_NK is None:
        scores = scores_of(logits, tokens, mask, batch.rollout)
    else:
        assert slots_NK is None
        ids = support_NK.long().view(B, T, -1)
        chosen = (ids == tokens[..., None]).int().argmax(-1)
        scores = scores_of(logits.gather(2, ids), chosen, mask)
    scores = replace(scores, entropy_BT=scores.entropy_BT.detach())
    batch = replace(batch, old_logprobs_BT=None, reference_logprobs_BT=scores.logprobs_BT.detach())
    loss, _ = objective.loss(batch, scores, objective.denominators(batch))
    return torch.autograd.grad(loss, logits)[0]


def reinforce_gradient(coefficients: Tensor, batch: Experience) -> Tensor:
    logits = table().requires_grad_()
    logprobs = scores_of(
        logits, batch.rollout.responses_BT, batch.mask_BT, batch.rollout
    ).logprobs_BT
    return torch.autograd.grad(-(coefficients * batch.advantages_BT * logprobs).sum(), logits)[0]


@pytest.mark.parametrize("objective", ON_POLICY.values(), ids=ON_POLICY)
def test_on_policy_every_algorithm_is_reinforce_with_its_own_reduction(objective):
    """The universal identity (docs/algorithms.md 16.6): ratio 1, whole vocabulary, reference = policy."""
    batch = experience(off_policy=False)
    coefficients = token_coefficients(objective, MASK) * row_weights(objective, MASK)
    error = relative_error(
        on_policy_gradient(objective, batch), reinforce_gradient(coefficients, batch)
    )
    assert error < 1e-6


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_on_policy_interior_tokens_learn_as_in_the_token_method(path):
    """Only the first N - 1 tokens of sliding blocks differ; all other algorithms equal token actions everywhere."""
    objective = from_yaml(path)
    actions = objective.actions
    first = actions.length - 1 if isinstance(actions, BlockActions) and actions.stride == 1 else 0
    batch = experience(off_policy=False)
    own = on_policy_gradient(objective, batch)
    tokens = on_policy_gradient(replace(objective, actions=TokenActions()), batch)
    if (
        isinstance(actions, SequenceActions) and not actions.mean
    ):  # a sum of log-ratios counts every token in full
        tokens = tokens * MASK.sum(1)[:, None, None]
    assert relative_error(own[:, first:], tokens[:, first:]) < 1e-6
    if first:  # beta_0, beta_0 + beta_1, …
        for t in range(first):
            assert relative_error(own[:, t], tokens[:, t] * sum(actions.weights_N[: t + 1])) < 1e-6


def test_algorithms_with_one_reduction_agree_on_policy():
    """grpo = gspo, dr_grpo proportional to dapo (docs/algorithms.md 16.4, invariant 2)."""
    batch = experience(off_policy=False)
    by_name = {path.stem: on_policy_gradient(from_yaml(path), batch) for path in ALGORITHMS}
    assert relative_error(by_name["gspo"], by_name["grpo"]) < 1e-6
    assert relative_error(by_name["gspo_token"], by_name["grpo"]) < 1e-6
    assert relative_error(by_name["rlpt"], by_name["grpo"]) < 1e-6
    ratio = MASK.sum() / (12 * (MASK.sum(1) > 0).sum())  # both take the same advantages here
    assert relative_error(by_name["dr_grpo"], by_name["dapo"] * ratio) < 1e-6


@each
def test_old_logprobs_equal_to_the_new_ones_are_the_same_as_none(objective):
    batch = experience(off_policy=False)
    now = scores_of(table(), batch.rollout.responses_BT, MASK, batch.rollout).logprobs_BT
    without, given = (
        loss_and_gradient(objective, batch),
        loss_and_gradient(objective, replace(batch, old_logprobs_BT=now)),
    )
    assert given[0] == pytest.approx(without[0])
    assert relative_error(given[1], without[1]) < 1e-12
    assert (
        next(value for name, (value, _) in given[2].items() if name.endswith("clip_fraction")) == 0
    )
