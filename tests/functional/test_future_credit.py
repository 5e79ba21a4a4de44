"""Advantages of future tokens: against loops, and the gradient that the block's ratio has."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.functional.actions import block_log_ratios
from lightning_mpo.functional.future_credit import (
    bound_negatives,
    centred_advantages,
    offset_log_ratios,
    prefix_advantages,
)
from lightning_mpo.functional.surrogates import clipped_ratio
from tests.support.builders import seeded

B, T, N = 6, 9, 3


def sample(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-ratios [B, T, N], a mask with gaps and empty rows, and advantages [B, T]."""
    draw = seeded(seed)
    log_ratios = torch.randn(B, T, N, generator=draw, dtype=torch.float64).mul(0.3)
    mask_BT = torch.rand(B, T, generator=draw) < 0.8
    mask_BT[0] = False
    return log_ratios, mask_BT, torch.randn(B, T, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize(("stride", "tail"), [(1, None), (1, "renorm"), (N, None), (N, "absorb")])
def test_with_one_advantage_the_offsets_add_up_to_the_block(stride, tail):
    log_ratios, mask_BT, advantages_BT = sample(0)
    weights_N = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    losses, gradients = [], []
    # the block as one action, and its offsets with the same advantage
    for split in (False, True):
        leaf = log_ratios.clone().requires_grad_()
        if split:
            ratios_BUN, weights_BUN, starts_BU, _ = offset_log_ratios(
                leaf, mask_BT, weights_N, stride=stride, tail=tail
            )
            shared_BUN = advantages_BT[..., None].expand(-1, -1, N)
            losses_BX = clipped_ratio(
                ratios_BUN.flatten(1), shared_BUN.flatten(1), low=0.2, high=0.2
            )
            losses_BUN = losses_BX.view_as(ratios_BUN)
            losses_BU = (weights_BUN * losses_BUN).sum(-1)
        else:
            ratios_BU, starts_BU, _ = block_log_ratios(
                leaf, mask_BT, weights_N, stride=stride, tail=tail
            )
            losses_BU = clipped_ratio(ratios_BU, advantages_BT, low=0.2, high=0.2)
        losses_BU = torch.where(starts_BU, losses_BU, 0)
        losses_BU.sum().backward()
        losses.append(losses_BU.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert gradients[0].abs().sum() > 0.1


def test_each_offset_has_a_gradient_of_its_advantage_alone():
    log_ratios, mask_BT, _ = sample(1)
    weights_N = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for n in range(N):
        leaf = log_ratios.clone().requires_grad_()
        ratios_BUN, weights_BUN, _, _ = offset_log_ratios(leaf, mask_BT, weights_N)
        (weights_BUN * ratios_BUN)[..., n].sum().backward()
        assert leaf.grad[..., n].abs().sum() > 0
        assert leaf.grad[..., [m for m in range(N) if m != n]].abs().sum() == 0


@pytest.mark.parametrize("invalid", [False, True])
def test_prefix_advantages_equal_a_loop(invalid):
    draw = seeded(2)
    tokens_BT = torch.randint(2, (12, 5), generator=draw)
    lengths_B = torch.randint(1, 6, (12,), generator=draw)
    mask_BT = torch.arange(5) < lengths_B[:, None]
    rewards_B = torch.randint(0, 3, (12,), generator=draw).float()
    valid_B = torch.rand(12, generator=draw) < 0.8 if invalid else torch.ones(12, dtype=torch.bool)
    advantages_BT = prefix_advantages(tokens_BT, mask_BT, rewards_B, 4, valid_B=valid_B)
    for b in range(12):
        group = [i for i in range(b // 4 * 4, b // 4 * 4 + 4) if valid_B[i]]
        for t in range(5):
            # the completions that have the first t tokens of this one
            same = [
                i
                for i in group
                if lengths_B[i] >= t and torch.equal(tokens_BT[i, :t], tokens_BT[b, :t])
            ]
            counts = mask_BT[b, t] and valid_B[b]
            mean = sum(rewards_B[i].item() for i in same) / len(same) if counts else 0.0
            expected = rewards_B[b].item() - mean if counts else 0.0
            assert advantages_BT[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_centred_advantages_have_mean_zero_at_each_position_of_a_group():
    draw = seeded(3)
    values_BT = torch.randn(8, 4, generator=draw)
    mask_BT = torch.arange(4) < torch.tensor([4, 3, 2, 1, 4, 4, 1, 1])[:, None]
    valid_B = torch.tensor([True] * 7 + [False])
    centred_BT = centred_advantages(values_BT, mask_BT, 4, valid_B=valid_B)
    torch.testing.assert_close(
        centred_BT.view(2, 4, 4).sum(1), torch.zeros(2, 4), atol=1e-6, rtol=0
    )
    assert centred_BT[~mask_BT].abs().sum() == 0
    assert centred_BT[7].abs().sum() == 0
    assert centred_BT[0, 3] == 0, "alone at its position"
    difference = values_BT[0, 0] - values_BT[1, 0]
    torch.testing.assert_close(centred_BT[0, 0] - centred_BT[1, 0], difference)


def test_bounded_advantages_are_weighed_where_negative_only():
    draw = seeded(4)
    advantages = torch.randn(3, 5, 2, generator=draw)
    heads = torch.rand(3, 5, 2, generator=draw).log()
    policy = torch.rand(3, 5, 2, generator=draw).log()
    bounded = bound_negatives(advantages, heads, policy)
    for value, result, q, p in zip(
        advantages.flatten(), bounded.flatten(), heads.flatten(), policy.flatten(), strict=True
    ):
        weight = min(1.0, (q - p).exp().item()) if value < 0 else 1.0
        assert result.item() == pytest.approx(value.item() * weight, rel=1e-6)
    assert (bounded != advantages).any()


@pytest.mark.parametrize(("rows", "group", "words"), [(4, 1, "at least 2"), (5, 2, "whole groups")])
def test_groups_are_checked(rows, group, words):
    values, mask = torch.zeros(rows, 3), torch.ones(rows, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=words):
        centred_advantages(values, mask, group)
    with pytest.raises(ValueError, match=words):
        prefix_advantages(mask.long(), mask, values[:, 0], group)
