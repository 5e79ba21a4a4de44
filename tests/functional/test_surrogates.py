"""The clipped surrogate: value, gradient, limits, and what follows with actions and reductions."""

import math

import pytest
import torch

from lightning_mpo.functional.actions import block_log_ratios, sequence_log_ratios
from lightning_mpo.functional.block_weights import block_weights
from lightning_mpo.functional.reductions import weighted_sum
from lightning_mpo.functional.surrogates import (
    asymmetric_ratio,
    clipped_ratio,
    clipped_weight,
    safe_ratio,
)


def loop_loss(ratio, advantage, low, high, dual):
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = -min(ratio * advantage, clipped * advantage)
    return min(loss, -dual * advantage) if dual is not None and advantage < 0 else loss


def loop_gradient(ratio, advantage, low, high, dual):
    """d loss / d log r, by the mask form."""
    stopped = (advantage > 0 and ratio > 1 + high) or (
        advantage < 0 and (ratio < 1 - low or (dual is not None and ratio > dual))
    )
    return 0.0 if stopped else -ratio * advantage


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4)])
@pytest.mark.parametrize("dual", [None, 3.0])
def test_value_and_gradient_are_the_definition(low, high, dual):
    ratios = [0.1, 0.5, 0.79, 0.81, 0.9997, 1.0, 1.0003, 1.1, 1.19, 1.27, 1.5, 2.9, 3.1, 9.0]
    advantages = [-2.0, -0.5, 0.0, 0.5, 2.0]
    grid = torch.cartesian_prod(torch.tensor(ratios), torch.tensor(advantages)).double()
    log_ratios = grid[:, 0].log().view(7, -1).requires_grad_()
    losses = clipped_ratio(log_ratios, grid[:, 1].view(7, -1), low=low, high=high, dual=dual)
    losses.sum().backward()
    for (ratio, advantage), loss, gradient in zip(
        grid.tolist(), losses.flatten().tolist(), log_ratios.grad.flatten().tolist(), strict=True
    ):
        assert loss == pytest.approx(loop_loss(ratio, advantage, low, high, dual), rel=1e-9)
        assert gradient == pytest.approx(loop_gradient(ratio, advantage, low, high, dual), rel=1e-9)


def gradient(ratio, advantage, dual=None):
    log_ratio = torch.tensor([[math.log(ratio)]], requires_grad=True)
    clipped_ratio(
        log_ratio, torch.tensor([[advantage]]), low=0.2, high=0.3, dual=dual
    ).sum().backward()
    return log_ratio.grad.item()


def test_where_the_gradient_stops():  # docs/algorithms.md 16.4, invariant 3
    assert gradient(1.31, 1.0) == 0
    assert gradient(0.5, 1.0) == pytest.approx(-0.5)
    assert gradient(0.79, -1.0) == 0
    assert gradient(1.5, -1.0) == pytest.approx(1.5)
    assert gradient(3.1, -1.0, dual=3.0) == 0
    assert gradient(2.9, -1.0, dual=3.0) == pytest.approx(2.9)
    assert gradient(3.1, 1.0, dual=3.0) == 0


def test_on_policy_the_whole_gradient_passes():
    for advantage in (1.0, -1.0):
        assert gradient(1.0, advantage, dual=3.0) == -advantage


def test_a_step_raises_good_actions_and_lowers_bad_ones():
    logits = torch.zeros(1, 3, requires_grad=True)
    actions, old = torch.tensor([0, 1]), torch.full((1, 2), -math.log(3))
    losses = clipped_ratio(
        logits.log_softmax(-1)[:, actions] - old, torch.tensor([[1.0, -1.0]]), low=0.2, high=0.2
    )
    losses.sum().backward()
    after = (logits - 0.1 * logits.grad).softmax(-1)[0]
    assert after[0] > 1 / 3 > after[1]


def test_absurd_ratios_overflow_nothing():
    log_ratios = torch.tensor([[1e4, -1e4, torch.inf, -torch.inf]], requires_grad=True)
    for advantage in (1.0, -1.0):
        losses = clipped_ratio(log_ratios, torch.full((1, 4), advantage), low=0.2, high=0.2)
        assert losses.isfinite().all()
        (grad,) = torch.autograd.grad(losses.sum(), log_ratios)
        assert torch.equal(grad, torch.zeros(1, 4))
    assert safe_ratio(torch.tensor([-1.0, 0.0, 20.0, 21.0])).tolist() == pytest.approx(
        [math.exp(-1), 1.0, math.exp(20), math.exp(20)]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": -0.1, "high": 0.2}, r"`low` must be in \[0, 1\), got -0.1"),
        ({"low": 1.0, "high": 0.2}, r"`low` must be in \[0, 1\), got 1.0"),
        ({"low": 0.2, "high": -0.1}, "`high` must be at least 0, got -0.1"),
        ({"low": 0.2, "high": 0.2, "dual": 1.0}, "`dual` must be above 1, got 1.0"),
    ],
)
def test_messages_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_ratio(torch.zeros(1, 1), torch.zeros(1, 1), **options)


def test_messages_name_the_argument():
    with pytest.raises(
        ValueError,
        match=r"`advantages_BU` must have shape \[B=1, U=2\] \(as `log_ratios_BU`\), got \[1, 3\]",
    ):
        clipped_ratio(torch.zeros(1, 2), torch.zeros(1, 3), low=0.2, high=0.2)


# ---- together with actions and reductions ----------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    logprobs, old = (-torch.rand(3, 6, generator=g, dtype=torch.float64) for _ in range(2))
    return logprobs, old, torch.randn(3, 1, generator=g, dtype=torch.float64).expand(3, 6)


def token_loss(log_ratios, advantages):
    return clipped_ratio(log_ratios, advantages, low=0.2, high=0.28)


def test_on_policy_a_sequence_action_has_the_gradient_of_its_tokens():  # docs/algorithms.md 16.4, invariant 2
    logprobs, _, advantages = batch()
    grads = []
    for sequence in (False, True):
        leaf = logprobs.clone().requires_grad_()
        log_ratios, mask, weights = leaf - logprobs, MASK, MASK.double()
        if sequence:
            log_ratios, mask, weights = sequence_log_ratios(log_ratios, MASK)
        per_row = weights / weights.sum(1, keepdim=True)  # a mean over each sequence
        weighted_sum(token_loss(log_ratios, advantages), per_row * mask, 3.0).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    assert grads[0].abs().max() > 0.01


def test_off_policy_a_block_of_one_is_the_token_method():  # docs/algorithms.md 16.1, invariant 1
    logprobs, old, advantages = batch()
    grads = []
    for blocks in (False, True):
        leaf = logprobs.clone().requires_grad_()
        log_ratios, weights = leaf - old, MASK.double()
        if blocks:
            log_ratios, _, weights = block_log_ratios(log_ratios, MASK, block_weights(1, 0.2))
        loss = weighted_sum(token_loss(log_ratios, advantages), weights, 14.0)
        loss.backward()
        grads.append((loss.detach(), leaf.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_no_mask_no_gradient_and_splits_do_not_matter():  # docs/algorithms.md 16.4, invariants 8 and 9
    logprobs, old, advantages = batch()
    whole = logprobs.clone().requires_grad_()
    weighted_sum(token_loss(whole - old, advantages), MASK.double(), 14.0).backward()
    assert (whole.grad[~MASK] == 0).all()
    parts = logprobs.clone().requires_grad_()
    for rows in ([0], [2, 1]):
        weighted_sum(
            token_loss((parts - old)[rows], advantages[rows]), MASK[rows].double(), 14.0
        ).backward()
    torch.testing.assert_close(whole.grad, parts.grad, rtol=1e-12, atol=0)


# ---- losses of tokens ------------------------------------------------------------------------------------------------


def token_gradient(surrogate, ratio, advantage, **options):
    """d loss / d log π(o), over the advantage and with its sign: the weight that a token learns with."""
    old = torch.tensor([[-2.0]], dtype=torch.float64)
    leaf = (old + math.log(ratio)).requires_grad_()
    surrogate(leaf, old, torch.full_like(old, advantage), **options).sum().backward()
    return leaf.grad.item() / -advantage


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_clipped_weight_never_stops_learning(advantage):  # docs/algorithms.md 16.4, invariant 4
    for ratio, weight in [(0.5, 0.8), (0.9, 0.9), (1.0, 1.0), (1.2, 1.2), (9.0, 1.3)]:
        assert token_gradient(clipped_weight, ratio, advantage, low=0.2, high=0.3) == pytest.approx(
            weight, rel=1e-9
        )
    assert token_gradient(clipped_weight, 0.01, advantage, low=1.0, high=0.3) == pytest.approx(
        0.01, rel=1e-9
    )


ASPO = {"low": 0.2, "high": 0.2, "cap_positive": 3.0, "cap_negative": 3.0}


def test_asymmetric_ratio_is_the_table_of_weights():  # docs/algorithms.md 5.4
    ratios = [0.2, 0.5, 0.9, 1.1, 1.19, 1.5, 4.0]
    good = [3.0, 2.0, 1 / 0.9, 1 / 1.1, 1 / 1.19, 0.0, 0.0]
    bad = [0.0, 0.0, 0.9, 1.1, 1.19, 1.5, 3.0]
    for ratio, up, down in zip(ratios, good, bad, strict=True):
        assert token_gradient(asymmetric_ratio, ratio, 0.7, **ASPO) == pytest.approx(up, rel=1e-9)
        assert token_gradient(asymmetric_ratio, ratio, -0.7, **ASPO) == pytest.approx(
            down, rel=1e-9
        )


def test_on_policy_all_surrogates_have_one_gradient():  # docs/algorithms.md 16.6 and 16.4, invariant 2
    logprobs, _, advantages = batch()
    grads = []
    for loss in (
        lambda x: token_loss(x - logprobs, advantages),
        lambda x: clipped_weight(x, logprobs, advantages, low=0.2, high=0.28),
        lambda x: asymmetric_ratio(x, logprobs, advantages, **ASPO),
    ):
        leaf = logprobs.clone().requires_grad_()
        weighted_sum(loss(leaf), MASK.double(), 14.0).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-12, atol=0)


def test_weights_carry_no_gradient_and_stay_finite():
    logprobs, old, advantages = (x.clone().requires_grad_() for x in batch())
    for loss in (
        clipped_weight(logprobs, old, advantages.detach(), low=0.2, high=0.3),
        asymmetric_ratio(logprobs - 500, old, advantages.detach(), **ASPO),
    ):
        loss.sum().backward()
        assert old.grad is None
        assert logprobs.grad.isfinite().all()


def test_messages_of_token_losses_name_the_option():
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"`low` must be in \(0, 1\], got 0.0"):
        clipped_weight(one, one, one, low=0.0, high=0.2)
    with pytest.raises(ValueError, match=r"`cap_positive` must be at least 1, got 0.5"):
        asymmetric_ratio(one, one, one, **{**ASPO, "cap_positive": 0.5})
    with pytest.raises(ValueError, match=r"`old_logprobs_BT` must have shape \[B=1, T=1\]"):
        clipped_weight(one, torch.zeros(1, 2), one, low=0.2, high=0.2)
