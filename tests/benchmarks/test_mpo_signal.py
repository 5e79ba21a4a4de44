"""Signal and noise of gradients with MPO ratios against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import SequenceActions, TokenActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import naive_logprobs
from tests.support.mpo_scripts import common, signal_to_noise


def naive_gradients(policy, frozen, loss_of):
    """Return each prompt's gradient of its part of a loss over tokens, times the prompts. Shape [P, D]."""
    rollout, mask = frozen.rollout, frozen.mask_BT
    rows = []
    for p in range(8):
        logprobs = naive_logprobs(policy.network, rollout)[0]
        loss = sum(
            loss_of(logprobs[b] - frozen.old_logprobs_BT[b][mask[b]], frozen.advantages_BT[b, 0])
            for b in range(4 * p, 4 * p + 4)
        )
        policy.zero_grad()
        (8 * loss / mask.sum()).backward()
        rows.append(torch.cat([weight.grad.flatten() for weight in policy.parts()["policy"]]))
    return torch.stack(rows).double()


def clipped_sum(log_ratios, advantage):
    ratios = log_ratios.exp()
    return -torch.minimum(ratios * advantage, ratios.clamp(0.8, 1.2) * advantage).sum()


def pairs_sum(log_ratios, advantage):
    later = torch.cat([log_ratios[1:], torch.zeros(1)])  # absorbed: nothing behind the end
    return clipped_sum(0.6 * log_ratios + 0.4 * later, advantage)


def sequence_sum(log_ratios, advantage):
    return len(log_ratios) * clipped_sum(log_ratios.mean()[None], advantage)


@pytest.mark.parametrize(
    ("name", "space", "loss_of"),
    [
        ("token", TokenActions(), clipped_sum),
        ("pairs", common.blocks(2, FutureShare(0.4), "backbone"), pairs_sum),
        ("sequence", SequenceActions(), sequence_sum),
    ],
)
def test_gradients_and_their_noise_are_the_definition(
    frozen_path, monkeypatch, name, space, loss_of
):
    frozen = common.Frozen.load(frozen_path)
    policy = common.load_policy(frozen_path.with_suffix(".ckpt"))
    monkeypatch.setattr(signal_to_noise, "spaces", lambda *_: {name: space})
    (setting,) = [
        s for s in signal_to_noise.make_settings(frozen, [], [], 0.2) if s.clip == "equal"
    ]
    (sums,) = signal_to_noise.gradients(policy, frozen, [setting])
    x = naive_gradients(policy, frozen, loss_of)
    mean, noise = x.mean(0), float(x.var(0).sum()) / 8
    torch.testing.assert_close(sums.mean_D, mean, rtol=1e-3, atol=float(mean.abs().max()) * 1e-4)
    value, without = sums.ratios()
    assert value == pytest.approx((float(mean.square().sum()) - noise) / noise, rel=1e-3, abs=1e-4)
    kept = x[[p for p in range(8) if p % 4 != 1]]  # four blocks of two prompts
    noise = float(kept.var(0).sum()) / 6
    assert without[1] == pytest.approx(
        (float(kept.mean(0).square().sum()) / noise - 1) * 8 / 6, rel=1e-3, abs=1e-4
    )


def test_blocks_of_heads_use_as_many_offsets_as_they_need(frozen_path, monkeypatch):
    frozen = common.Frozen.load(frozen_path)
    policy = common.load_policy(frozen_path.with_suffix(".ckpt"))
    found = {
        "N=2": common.blocks(2, FutureShare(0.4), "mtp"),
        "N=3": common.blocks(3, FutureShare(0.4), "mtp"),
    }
    monkeypatch.setattr(signal_to_noise, "spaces", lambda *_: found)
    settings = [s for s in signal_to_noise.make_settings(frozen, [], [], 0.2) if s.clip == "equal"]
    mask, advantages = frozen.mask_BT, frozen.advantages_BT
    for (name, betas), sums in zip(
        {"N=2": [0.6, 0.4], "N=3": [0.6, 0.2, 0.2]}.items(),
        signal_to_noise.gradients(policy, frozen, settings),
        strict=True,
    ):
        scores = policy.score(frozen.rollout, mask, temperature=1.0, request=ScoreRequest(future=2))
        log_ratios = betas[0] * (scores.logprobs_BT - frozen.old_logprobs_BT)
        for n in range(1, len(betas)):
            alive = torch.cat([mask[:, n:], torch.zeros(32, n, dtype=torch.bool)], 1)
            moved = scores.future_BTM[..., n - 1] - frozen.old_future_BTM[..., n - 1]
            log_ratios = log_ratios + betas[n] * torch.where(alive, moved, 0.0)
        ratios = log_ratios.exp()
        losses = -torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
        policy.zero_grad()
        (losses[mask].sum() / mask.sum()).backward()
        expected = torch.cat(
            [weight.grad.flatten() for weight in policy.parts()["policy"]]
        ).double()
        tolerance = float(expected.abs().max()) * 1e-4
        torch.testing.assert_close(
            sums.mean_D, expected, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_on_policy_the_backbone_changes_first_tokens_only(frozen_path):
    """At rollout weights a block's gradient is the token level's, but for its first tokens (invariant 5)."""
    later = common.Frozen.load(frozen_path)
    frozen = common.Frozen(later.rollout, later.advantages_BT, later.logprobs_BT, later.logprobs_BT)
    policy = common.load_policy(frozen_path.with_suffix(".ckpt"))
    settings = signal_to_noise.make_settings(frozen, [3], [0.4], 0.2)
    assert [s.name for s in settings] == ["token", "backbone, N=3, 40%", "sequence"], (
        "nothing clips, nothing to match"
    )
    sums = signal_to_noise.gradients(policy, frozen, settings)
    factors = torch.ones(frozen.mask_BT.shape[1])
    factors[:2] = torch.tensor([0.6, 0.8])

    def coefficients(log_ratios, advantage):
        return (
            -(log_ratios * factors[: len(log_ratios)]).sum() * advantage
        )  # d/dx exp(x) = 1 at x = 0

    expected = naive_gradients(policy, frozen, coefficients).mean(0)
    torch.testing.assert_close(
        sums[1].mean_D, expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-4
    )
    torch.testing.assert_close(
        sums[0].mean_D, sums[2].mean_D, rtol=1e-3, atol=float(sums[0].mean_D.abs().max()) * 1e-4
    )  # with token counts as weights the sequence's gradient is the token level's, too


def test_a_policy_that_was_not_frozen_is_refused(checkpoint, frozen_path, tmp_path):
    with pytest.raises(UserError, match="is not the policy of the frozen rollout"):
        signal_to_noise.main(
            ["--frozen", str(frozen_path), "--checkpoint", checkpoint, "--out", str(tmp_path)]
        )


def test_the_interval_of_a_ratio_needs_positive_signals():
    low, high = signal_to_noise.interval_of_ratio(2.0, [1.8, 2.2], 1.0, [0.9, 1.1])
    assert (low, high) == pytest.approx((2.0, 2.0)), "both move alike"
    low, high = signal_to_noise.interval_of_ratio(2.0, [1.0, 4.0], 1.0, [1.0, 1.0])
    assert low * high == pytest.approx(4.0)
    assert high == pytest.approx(2 * 4 ** (12.71 / 2))
    assert math.isnan(signal_to_noise.interval_of_ratio(2.0, [1.0, -0.1], 1.0, [1.0, 1.0])[0])
