"""Advantages of the later tokens of a block, through the whole loss of an objective."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.functional.advantages import group_relative
from lightning_mpo.functional.future_credit import centred_advantages, prefix_advantages
from lightning_mpo.objective.advantages import GroupRelative
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.future_credit import (
    CentredCredit,
    FutureCredit,
    OutcomeCredit,
    SameCredit,
    StateCredit,
)
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.scores import TokenScores
from tests.support.builders import make_experience, right_padded, seeded, subclasses

N, M = 3, 2
MASK = right_padded([6, 4, 1, 7], 7)
B, T = MASK.shape
CREDITS = [SameCredit, OutcomeCredit, CentredCredit, StateCredit]


def test_the_list_has_every_rule():
    assert subclasses(FutureCredit) == set(CREDITS)


def compose(credit: FutureCredit | None, **block) -> Objective:
    return Objective(
        actions=BlockActions(FutureShare(0.4), length=N, source="mtp", credit=credit, **block)
    )


def scores(seed: int, scale: float = 0.2) -> TokenScores:
    """Return log-probs of tokens and heads that carry gradient."""
    draw = seeded(seed)
    logprobs_BT = torch.randn(B, T, generator=draw).mul(scale).sub(1)
    future_BTM = torch.randn(B, T, M, generator=draw).mul(scale).sub(1)
    return TokenScores(
        logprobs_BT.requires_grad_(), torch.zeros(B, T), future_BTM=future_BTM.requires_grad_()
    )


def loss_and_gradients(
    objective: Objective, future_advantages_BT: Tensor | None
) -> tuple[Tensor, ...]:
    now, old = scores(0), scores(1)
    experience = make_experience(
        MASK,
        torch.randn(B, T, generator=seeded(2)) * MASK,
        old_logprobs_BT=old.logprobs_BT.detach(),
        old_future_BTM=old.future_BTM.detach(),
    )
    if future_advantages_BT is not None:
        experience = replace(experience, future_advantages_BT=future_advantages_BT)
    loss, _ = objective.loss(experience, now, objective.denominators(experience))
    loss.backward()
    return loss.detach(), now.logprobs_BT.grad, now.future_BTM.grad


@pytest.mark.parametrize("block", [{}, {"stride": N}, {"tail": "renorm"}], ids=str)
def test_the_same_credit_is_the_loss_without_one(block):
    advantages_BT = torch.randn(B, T, generator=seeded(2)) * MASK
    split = loss_and_gradients(compose(SameCredit(), **block), advantages_BT)
    plain = loss_and_gradients(compose(None, **block), None)
    for a, b in zip(split, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert plain[2].abs().sum() > 1e-3


def test_heads_have_the_gradient_of_their_advantage_and_the_token_keeps_its_own():
    later_BT = torch.full((B, T), 2.0)
    objective = compose(OutcomeCredit())
    _, token, heads = loss_and_gradients(objective, later_BT)
    _, token_zero, heads_zero = loss_and_gradients(objective, torch.zeros(B, T))
    torch.testing.assert_close(token, token_zero)
    assert heads.abs().sum() > 1e-3
    assert heads_zero.abs().sum() == 0


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_negative_advantages_of_later_tokens_are_kept_dropped_or_bounded(sign):
    later_BT = torch.full((B, T), sign)
    kept, dropped, bounded = (
        loss_and_gradients(compose(OutcomeCredit(negatives)), later_BT)[2]
        for negatives in ("keep", "drop", "bound")
    )
    if sign > 0:
        torch.testing.assert_close(kept, dropped)
        torch.testing.assert_close(kept, bounded)
        return
    assert dropped.abs().sum() == 0
    assert (bounded.abs() <= kept.abs() + 1e-9).all()
    # the weight: min(1, q_old / π_old) of the token
    old = scores(1)
    for n in range(1, N):
        ratio_BT = (old.future_BTM[:, : T - n, n - 1] - old.logprobs_BT[:, n:]).clamp(max=0).exp()
        expected = kept[:, : T - n, n - 1] * ratio_BT
        torch.testing.assert_close(bounded[:, : T - n, n - 1], expected.detach())


def outcome() -> Outcome:
    rewards_B = torch.tensor([1.0, 0.0, 0.0, 1.0])
    last_BT = MASK & ~torch.nn.functional.pad(MASK[:, 1:], (0, 1))
    tokens_BT = torch.randint(2, (B, T), generator=seeded(3))
    valid_B = torch.ones(B, dtype=torch.bool)
    return Outcome(rewards_B[:, None] * last_BT, MASK, 2, valid_B, tokens_BT=tokens_BT)


def test_each_rule_returns_its_advantages():
    judged, advantages_BT = outcome(), torch.randn(B, T, generator=seeded(4)) * MASK
    rewards_B = judged.rewards_B
    assert torch.equal(SameCredit().advantages(judged, advantages_BT), advantages_BT)
    torch.testing.assert_close(
        OutcomeCredit().advantages(judged, advantages_BT),
        group_relative(rewards_B, 2)[:, None].expand(B, T) * MASK,
    )
    torch.testing.assert_close(
        CentredCredit().advantages(judged, advantages_BT),
        centred_advantages(advantages_BT, MASK, 2),
    )
    torch.testing.assert_close(
        StateCredit().advantages(judged, advantages_BT),
        prefix_advantages(judged.tokens_BT, MASK, rewards_B, 2),
    )


@pytest.mark.parametrize("block", [{"source": "backbone"}, {"ratio": "joint"}], ids=str)
def test_blocks_without_heads_or_with_the_product_have_one_advantage(block):
    with pytest.raises(UserError, match="set `source: mtp` and `ratio: weighted`"):
        BlockActions(length=3, **({"source": "mtp"} | block), credit=StateCredit())


@pytest.mark.parametrize("rule", CREDITS)
def test_a_rule_that_compares_completions_needs_two(rule):
    objective = compose(rule())
    objective.check_group(2)
    if rule is SameCredit:
        Objective(actions=objective.actions, advantage=GroupRelative()).actions.check_group(1)
        return
    with pytest.raises(UserError, match=rf"`{rule.__name__}` .*at least 2, got 1"):
        objective.actions.check_group(1)


def test_negatives_are_one_of_three():
    with pytest.raises(UserError, match="keep"):
        StateCredit(negatives="forget")


def test_later_tokens_alone_have_something_to_teach():
    """All first tokens have advantage 0; an update is idle only if later tokens have it, too."""
    objective, zero_BT = compose(StateCredit()), torch.zeros(B, T)
    idle = replace(make_experience(MASK, zero_BT), future_advantages_BT=zero_BT)
    later = replace(idle, future_advantages_BT=torch.ones(B, T))
    assert objective.nothing_to_learn(objective.denominators(idle))
    assert not objective.nothing_to_learn(objective.denominators(later))


def test_a_block_of_one_token_has_no_later_tokens_to_credit():
    block = BlockActions(length=1, source="mtp", credit=StateCredit())
    outcome = Outcome(torch.zeros(2, 3), torch.ones(2, 3).bool(), 2, torch.ones(2).bool())
    assert block.future_advantages(outcome, torch.zeros(2, 3)) is None
