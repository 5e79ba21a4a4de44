"""Limiting cases of the action spaces whose ratios are products along a response."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.functional.surrogates import safe_ratio
from lightning_mpo.objective.action_spaces import SequenceActions, TokenActions
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.surrogates import ClippedRatio
from lightning_mpo.objective.trace_actions import ForwardTraceActions, PrefixActions
from tests.support.action_spaces import PLAIN, group, ratios
from tests.support.builders import relative_error, right_padded
from tests.support.objectives import COMPOSITIONS, compose, experience, loss_and_gradient


@pytest.mark.parametrize("name", ["grpo", "dapo", "dual", "dppo_tv", "gmpo"])
def test_a_trace_of_one_token_is_the_token_level_method(name):
    plain = replace(COMPOSITIONS[name], actions=TokenActions())
    traced = replace(plain, actions=ForwardTraceActions(1))
    (loss, gradient, _), (expected, expected_gradient, _) = (
        loss_and_gradient(objective, experience()) for objective in (traced, plain)
    )
    assert loss == expected
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("steps", [2, 3, 20])
def test_factor_times_ratio_is_the_ratio_of_a_joint_block(steps):
    """The value is that of `BlockActions(ratio="joint")`; the gradient is that of one token."""
    values = ratios(PLAIN).requires_grad_()
    actions = ForwardTraceActions(steps).actions(values, values.detach(), PLAIN)
    blocks = group(BlockActions(length=steps, ratio="joint"), values, PLAIN)[0]
    products = torch.where(PLAIN, actions.factors_BU * safe_ratio(actions.log_ratios_BU), 1.0)
    torch.testing.assert_close(products, blocks.exp())
    (own,) = torch.autograd.grad(products[3, 0], values, retain_graph=True)
    assert own[3].count_nonzero() == 1
    (joint,) = torch.autograd.grad(blocks[3, 0].exp(), values)
    assert joint[3].count_nonzero() == min(steps, 4)
    torch.testing.assert_close(own[3, 0], joint[3, 0])


@pytest.mark.parametrize("mean", [False, True])
def test_the_last_prefix_is_the_response(mean):
    values = ratios(PLAIN)
    prefixes = group(PrefixActions(mean), values, PLAIN)[0]
    responses = group(SequenceActions(mean), values, PLAIN)[0][:, 0]
    last = (PLAIN.sum(1) - 1).clamp(min=0)
    torch.testing.assert_close(prefixes.gather(1, last[:, None])[:, 0], responses)


@pytest.mark.parametrize("mean", [False, True])
def test_prefixes_of_one_token_are_tokens(mean):
    mask = right_padded([1, 0, 1, 1], 4)
    values = ratios(mask)
    torch.testing.assert_close(
        group(PrefixActions(mean), values, mask)[0], group(TokenActions(), values, mask)[0]
    )


def test_the_trace_is_a_metric():
    objective = replace(COMPOSITIONS["grpo"], actions=ForwardTraceActions(3))
    value, count = loss_and_gradient(objective, experience())[2]["ratio/trace"]
    assert 0.5 < value / count < 2
    assert value != count
    assert "ratio/trace" not in loss_and_gradient(COMPOSITIONS["grpo"], experience())[2]


def test_the_first_tokens_of_a_response_learn_less_if_the_rest_has_become_unlikely():
    """Old log-probs of the last token are raised: its ratio falls, and with it the trace of those before."""
    batch = experience()
    last = 8  # of row 3, which has 9 tokens
    old_BT = batch.old_logprobs_BT.clone()
    old_BT[3, last] += 1.0
    objective = compose(ForwardTraceActions(2), ClippedRatio(0.99, 99.0))
    before = loss_and_gradient(objective, batch)[1]
    after = loss_and_gradient(objective, replace(batch, old_logprobs_BT=old_BT))[1]
    assert before[3, last - 1].any()
    factor = math.exp(-1)
    assert relative_error(after[3, last - 1], before[3, last - 1] * factor) < 1e-9
    assert torch.equal(after[3, : last - 1], before[3, : last - 1])


def test_steps_out_of_range_are_refused_by_name():
    with pytest.raises(UserError, match="`ForwardTraceActions.steps` must be at least 1, got 0"):
        ForwardTraceActions(0)
