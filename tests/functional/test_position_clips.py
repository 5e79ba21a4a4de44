"""`position_clip` equals the clip of PPO with the bounds of each position."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mpo.functional.position_clips import outside_position_clip, position_clip
from lightning_mpo.functional.surrogates import clipped_ratio
from lightning_mpo.functional.trust_regions import outside_clip
from tests.support.builders import seeded

BOUNDS = {"low": 0.1, "high": 0.2, "dual": 0.3}


def batch():
    log_ratios = torch.randn(6, 40, generator=seeded(0), dtype=torch.float64)
    advantages = torch.randn(6, 40, generator=seeded(1), dtype=torch.float64)
    return log_ratios, advantages, torch.arange(1.0, 41.0).expand(6, 40)


@pytest.mark.parametrize("power", [0.5, -0.5, 0.0])
@pytest.mark.parametrize("dual", [0.3, None])
def test_it_is_the_clip_of_ppo_at_the_bounds_of_each_position(power, dual):
    log_ratios, advantages, positions = batch()
    options = BOUNDS | {"dual": dual, "power": power}
    losses = position_clip(log_ratios, advantages, positions, **options)
    outside = outside_position_clip(log_ratios, advantages, positions, **options)
    for t in range(40):
        low, high, cap = (
            math.exp(bound * (t + 1) ** power) for bound in (-0.1, 0.2, dual or math.inf)
        )
        here = log_ratios[:, [t]], advantages[:, [t]]
        ppo = {"low": 1 - low, "high": high - 1, "dual": cap if dual else None}
        torch.testing.assert_close(losses[:, [t]], clipped_ratio(*here, **ppo))
        expected = outside_clip(here[0].exp(), here[1], **ppo)
        assert torch.equal(outside[:, [t]], expected)
    assert 0 < outside.sum() < outside.numel()


def test_a_dual_clip_at_the_upper_bound_stops_bad_actions_on_both_sides():
    log_ratios = torch.tensor([[-0.3, -0.05, 0.05, 0.3]])
    outside = outside_position_clip(
        *(log_ratios, -torch.ones(1, 4), torch.ones(1, 4)), low=0.1, high=0.2, dual=0.2, power=0.5
    )
    assert outside.tolist() == [[True, False, False, True]]


def test_positions_outside_the_mask_do_not_matter():
    log_ratios = torch.zeros(1, 1)
    losses = position_clip(log_ratios, log_ratios, torch.zeros(1, 1), **BOUNDS, power=-0.5)
    assert torch.isfinite(losses).all()


@pytest.mark.parametrize("name", ["low", "high", "dual"])
@pytest.mark.parametrize("function", [position_clip, outside_position_clip])
def test_bounds_that_are_not_positive_are_refused(function, name):
    with pytest.raises(ValueError, match=f"`{name}` must be above 0, got 0.0"):
        function(*batch(), **(BOUNDS | {name: 0.0}), power=0.5)
