"""Spread and clip fractions of MPO ratios against hand computations."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import TokenActions
from tests.support.builders import make_rollout, right_padded, seeded
from tests.support.mpo_scripts import clip_fraction, common, ratio_variance


def by_hand(log_ratios, advantages, lengths=None, future=None):
    """Return a frozen rollout with given log-ratios; `future` is [B, T, M]."""
    log_ratios, advantages = torch.tensor(log_ratios), torch.tensor(advantages)
    B, T = log_ratios.shape
    rollout = make_rollout([2], [T] * B)
    mask = right_padded(lengths or [T] * B, T)
    object.__setattr__(rollout, "response_mask_BT", mask)
    zeros = torch.zeros(B, T)
    more = {}
    if future is not None:
        ahead = torch.tensor(future)
        more = {"old_future_BTM": torch.zeros_like(ahead), "future_BTM": ahead}
    return common.Frozen(rollout, advantages[:, None] * mask, zeros, log_ratios, **more)


# --- variance of the ratio ----------------------------------------------------------------------------------------


def test_spread_of_pairs_by_hand():
    frozen = by_hand([[0.1, 0.3, -0.2, 0.5]], [1.0])
    rows = {(row["weights"], row["N"]): row for row in ratio_variance.measure(frozen, 2)}
    joint, uniform = torch.tensor([0.4, 0.1, 0.3]), torch.tensor([0.2, 0.05, 0.15])
    assert rows["joint", 2]["std log R"] == pytest.approx(float(joint.std()), rel=1e-5)
    assert rows["uniform", 2]["std log R"] == pytest.approx(float(uniform.std()), rel=1e-5)
    assert rows["uniform", 2]["var R"] == pytest.approx(float(uniform.exp().var()), rel=1e-5)
    weights = uniform.exp()
    ess = float(weights.sum() ** 2 / (3 * weights.square().sum()))
    assert rows["uniform", 2]["effective samples"] == pytest.approx(ess, rel=1e-5)
    first, second = torch.tensor([0.1, 0.3, -0.2]).std(), torch.tensor([0.3, -0.2, 0.5]).std()
    share = rows["share 40 %", 2]
    assert share["s sqrt(sum beta^2)"] == pytest.approx(
        float(first) * math.sqrt(0.6**2 + 0.4**2), rel=1e-5
    )
    assert share["sqrt(sum beta^2 s_n^2)"] == pytest.approx(
        math.hypot(0.6 * first, 0.4 * second), rel=1e-5
    )


def test_independent_ratios_spread_as_predicted():
    log_ratios = 0.1 * torch.randn(400, 40, generator=seeded(0))
    rows = ratio_variance.measure(by_hand(log_ratios.tolist(), [1.0] * 400), 5)
    assert {row["N"] for row in rows} == set(range(1, 6))
    for row in rows:
        assert row["std log R"] == pytest.approx(row["s sqrt(sum beta^2)"], rel=0.04)


def test_heads_are_read_from_their_own_columns():
    frozen = by_hand([[0.1, 0.3, -0.2]], [1.0], future=[[[1.0, 7.0], [2.0, 7.0], [9.0, 7.0]]])
    rows = {
        (row["source"], row["weights"], row["N"]): row for row in ratio_variance.measure(frozen, 2)
    }
    assert rows["mtp", "joint", 2]["std log R"] == pytest.approx(
        float(torch.tensor([1.1, 2.3]).std()), rel=1e-5
    )
    assert rows["mtp", "joint", 1]["std log R"] == rows["backbone", "joint", 1]["std log R"]
    assert max(row["N"] for row in ratio_variance.measure(by_hand([[0.1] * 9], [1.0], future=[[[0.0]] * 9]), 4)
               if row["source"] == "mtp") == 2  # fmt: skip


def test_blocks_longer_than_any_response_are_refused():
    with pytest.raises(UserError, match="lower --longest"):
        ratio_variance.measure(by_hand([[0.1, 0.2]], [1.0]), 3)


# --- clip fraction ------------------------------------------------------------------------------------------------


def test_clip_fraction_and_its_match_by_hand():
    up, down = math.log(1.5), math.log(0.7)
    frozen = by_hand([[up, up, 0.0, 0.0], [down, 0.0, up, 0.0]], [1.0, -1.0])
    (row,) = clip_fraction.measure(frozen, [2], [0.5], 0.2)
    # halves of neighbours, absorbed at the end: up: 1.5, 1.22, 1, 1 of which two clip; down: 0.84 does not clip
    assert row["clip fraction"] == pytest.approx(2 / 8)
    # three tokens of eight clip at 0.2; the third largest distance is 1 - sqrt(0.7) = 0.163, the next ones are 0
    assert row["matched epsilon"] == pytest.approx((1 - math.sqrt(0.7)) / 2, rel=1e-4)
    assert row["clip fraction there"] == pytest.approx(3 / 8)
    assert row["epsilon sqrt(sum beta^2)"] == pytest.approx(0.2 * math.sqrt(0.5))
    # 1.5^0.707 = 1.33 clips, 0.7^0.707 = 0.777 clips
    assert row["mechanical clip fraction"] == pytest.approx(3 / 8)


def test_a_share_of_nothing_is_the_token_level(frozen_path):
    frozen = common.Frozen.load(frozen_path)
    token = frozen.clip_fraction(TokenActions(), 0.2)
    assert 0.02 < token < 0.9
    for row in clip_fraction.measure(frozen, [2, 3, 5], [0.0], 0.2):
        assert row["clip fraction"] == row["mechanical clip fraction"] == pytest.approx(token)
    count = int(frozen.mask_BT.sum())
    for row in clip_fraction.measure(frozen, [2, 3, 5], [0.1, 0.5], 0.2):
        assert row["clip fraction there"] == pytest.approx(token, abs=1.5 / count)


def test_normal_ratios_clip_as_predicted():
    log_ratios = 0.15 * torch.randn(400, 40, generator=seeded(1))
    frozen = by_hand(log_ratios.tolist(), [1.0, -1.0] * 200)
    for row in clip_fraction.measure(frozen, [5], [0.2, 0.4], 0.2):
        assert row["clip fraction"] == pytest.approx(row["mechanical clip fraction"], abs=0.01)
        assert row["matched epsilon"] == pytest.approx(row["epsilon sqrt(sum beta^2)"], rel=0.06)


def test_a_policy_that_did_not_move_is_refused():
    with pytest.raises(UserError, match="clips nothing"):
        clip_fraction.measure(by_hand([[0.0, 0.1]], [1.0]), [2], [0.1], 0.2)
