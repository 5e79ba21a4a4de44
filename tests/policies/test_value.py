"""Critics against one row at a time, and where their gradients go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mpo.policies import CausalPolicy, Critic, ParallelHeads, SeparateCritic
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import make_rollout, relative_error, seeded, subclasses
from tests.support.critics import (
    CRITICS,
    PROMPTS,
    REQUEST,
    RESPONSES,
    always_share,  # noqa: F401
    each_critic,
    naive,
    scramble_critic,
    values_of,
)

ORDER = [3, 0, 8, 5, 1, 2, 7, 4, 6]


def weights_of(policy: CausalPolicy) -> list[Tensor]:
    return [weight for weight in policy.parameters() if weight.requires_grad]


def test_the_list_has_every_critic():
    assert subclasses(Critic) == {
        type(policy_with_critic()) for policy_with_critic in CRITICS.values()
    }


# --- values ---------------------------------------------------------------------------------------------------------


@each_critic
@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize(
    "options",
    [{}, {"order": ORDER, "left": 3, "right": 2}, {"support": 5}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_values_and_gradients_equal_a_loop_over_rows_and_tokens(
    policy_with_critic, kind, share, options
):
    policy, rollout = (
        policy_with_critic(kind, share_prompts=share),
        make_rollout(PROMPTS, RESPONSES, **options),
    )
    mask = rollout.response_mask_BT
    values = values_of(policy, rollout)
    expected = torch.cat(naive(policy, rollout))
    torch.testing.assert_close(values[mask], expected, rtol=1e-6, atol=1e-6)
    assert values[mask].std() > 0.1
    assert not values[~mask].any()
    if kind == "detached":
        return
    weight = torch.randn(len(expected), generator=seeded(3), dtype=torch.float64)
    own, loop = (
        torch.autograd.grad((weight * part).sum(), weights_of(policy), allow_unused=True)
        for part in (values[mask], expected)
    )
    for value, wanted in zip(own, loop, strict=True):
        assert (value is None) == (wanted is None)
        if wanted is not None:
            assert relative_error(value, wanted) < 1e-6


@each_critic
def test_values_start_at_zero(policy_with_critic, kind):
    assert not values_of(
        policy_with_critic(kind, fresh=True), make_rollout(PROMPTS, RESPONSES)
    ).any()


@each_critic
def test_only_the_tokens_asked_for_are_valued(policy_with_critic, kind):
    policy, rollout = policy_with_critic(kind), make_rollout(PROMPTS, RESPONSES)
    mask = rollout.response_mask_BT & (
        torch.rand(rollout.response_mask_BT.shape, generator=seeded(1)) < 0.5
    )
    mask[0] = False
    torch.testing.assert_close(values_of(policy, rollout, mask), values_of(policy, rollout) * mask)
    assert policy.score(rollout, mask, temperature=1.0).values_BT is None


@each_critic
def test_log_probs_are_the_same_with_values(policy_with_critic, kind):
    policy, rollout = policy_with_critic(kind), make_rollout(PROMPTS, RESPONSES)
    mask = rollout.response_mask_BT
    with_values, without = (
        policy.score(rollout, mask, temperature=0.7, request=request)
        for request in (REQUEST, ScoreRequest())
    )
    assert torch.equal(with_values.logprobs_BT, without.logprobs_BT)


@pytest.mark.parametrize("family", [None, ParallelHeads])
def test_values_beside_multi_token_heads(policy_with_critic, family):
    heads = None if family is None else family(offsets=2)
    policy, rollout = policy_with_critic(mtp=heads), make_rollout(PROMPTS, RESPONSES)
    request = ScoreRequest(values=True, future=2 if family else 0)
    values = policy.score(
        rollout, rollout.response_mask_BT, temperature=1.0, request=request
    ).values_BT
    torch.testing.assert_close(values[rollout.response_mask_BT], torch.cat(naive(policy, rollout)))


# --- gradients ------------------------------------------------------------------------------------------------------


@each_critic
def test_gradients_go_where_they_are_told(policy_with_critic, kind):
    """Into the trunk from a head on it, unless detached; never from a critic of its own."""
    policy, rollout = policy_with_critic(kind), make_rollout(PROMPTS, RESPONSES)
    values_of(policy, rollout).sum().backward()
    reached = {
        part: [weight.grad is not None and bool(weight.grad.any()) for weight in weights]
        for part, weights in policy.parts().items()
    }
    assert set(reached) == {"policy", "critic"}
    assert all(reached["critic"])
    assert all(reached["policy"]) == any(reached["policy"]) == (kind in ("linear", "hidden"))


@each_critic
def test_nothing_to_value_still_reaches_every_weight_of_the_critic(policy_with_critic, kind):
    """An empty micro-batch takes part in the backward pass, at gradient 0: DDP waits for it."""
    policy, rollout = policy_with_critic(kind), make_rollout(PROMPTS, RESPONSES)
    values_of(policy, rollout, torch.zeros_like(rollout.response_mask_BT)).sum().backward()
    assert all(
        weight.grad is not None and not weight.grad.any() for weight in policy.parts()["critic"]
    )


def test_checkpointing_recomputes_and_changes_no_gradient(tiny_policy):
    rollout = make_rollout(PROMPTS, RESPONSES)
    gradients, calls = [], []
    for flag in (False, True):
        policy = tiny_policy(critic=SeparateCritic(checkpointing=flag), double=True)
        scramble_critic(policy.critic)
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        policy.critic.trunk.layers[0].self_attn.register_forward_pre_hook(count)
        values_of(policy, rollout).sum().backward()
        gradients.append([weight.grad for weight in policy.parts()["critic"]])
    assert calls == [1, 2]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
