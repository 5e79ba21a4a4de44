"""MeanField and CoupledTokens: how many tokens they hide, and how they weigh them."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.objective.one_pass import CoupledTokens, MeanField
from tests.support.builders import seeded
from tests.support.masked_rollouts import ENDS, masked_rollout

B, T = len(ENDS), 8


def test_mean_field_hides_the_canvas_and_scores_the_response():
    rollout = masked_rollout()
    noise = MeanField().draw(rollout, seeded(0))
    assert noise.hidden_BCL[:, 0, -T:].all()
    assert torch.equal(noise.weights_BCT[:, 0], rollout.response_mask_BT.float())


@pytest.mark.parametrize("share", [0.0, 0.15, 0.6])
def test_mean_field_hides_its_share_of_the_prompt(share):
    rollout = masked_rollout([None] * 400, prompts=[20])
    hidden_BS = MeanField(prompt_share=share).draw(rollout, seeded(1)).hidden_BCL[:, 0, :20]
    assert float(hidden_BS.float().mean()) == pytest.approx(share, abs=0.02)


def test_coupled_tokens_hide_all_and_then_complements():
    rollout = masked_rollout()
    noise = CoupledTokens().draw(rollout, seeded(2))
    hidden_BCT = noise.hidden_BCL[..., -T:]
    assert hidden_BCT[:, 0].all()
    assert (hidden_BCT[:, 1] ^ hidden_BCT[:, 2]).all()


def test_half_of_the_weight_is_that_of_the_full_mask_and_half_is_divided_by_the_share():
    """½ log p(full) + ½ log p(pair) / share, where the third copy has the share 1 - ρ."""
    rollout, share = masked_rollout(), 0.3
    noise = CoupledTokens(least=share, most=share).draw(rollout, seeded(3))
    response_BT, hidden_BCT = rollout.response_mask_BT, noise.hidden_BCL[..., -T:]
    for copy, weight in enumerate((0.5, 0.5 / share, 0.5 / (1 - share))):
        expected_BT = weight * (hidden_BCT[:, copy] & response_BT)
        torch.testing.assert_close(noise.weights_BCT[:, copy], expected_BT)


def test_the_expected_weight_of_a_token_is_one():
    rollout = masked_rollout([None] * 4000, prompts=[2])
    weights_BCT = CoupledTokens().draw(rollout, seeded(4)).weights_BCT
    assert float(weights_BCT.sum(1).mean()) == pytest.approx(1.5, abs=0.02)
    assert float(weights_BCT[:, 1].mean()) == pytest.approx(0.5, abs=0.02)


def test_shares_differ_from_row_to_row_and_stay_within_their_bounds():
    rollout = masked_rollout([None] * 300, prompts=[2])
    weights_BCT = CoupledTokens(least=0.2, most=0.4).draw(rollout, seeded(5)).weights_BCT
    share_B = 0.5 / weights_BCT[:, 1].amax(1).clamp(min=0.5)
    share_B = share_B[weights_BCT[:, 1].amax(1) > 0]
    assert (share_B >= 0.2 - 1e-6).all()
    assert (share_B <= 0.4 + 1e-6).all()
    assert float(share_B.std()) > 0.03
