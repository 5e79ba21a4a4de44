"""Hidden tokens of demonstrations: shares, weights, and the expectation of the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.modules.masked_tokens import MaskedTokens
from tests.support.builders import make_rollout, seeded

CANVAS = 6


def demonstrations(rows: int):
    """Rows whose prompts have four tokens, and whose responses fill the canvas."""
    rollout = make_rollout([4] * rows, [CANVAS] * rows)
    return replace(rollout, attention_mask_BL=torch.ones_like(rollout.attention_mask_BL))


def hidden(rows: int, least: float = 1e-3, *, stratified: bool = False):
    """Return the hidden tokens of the responses, and their weights."""
    tokens = MaskedTokens(CANVAS, least, stratified)
    numbers_BX = tokens.numbers(rows, seeded(0))
    noised = tokens.hide(demonstrations(rows), numbers_BX)
    assert not noised.hidden_BCL[..., :-CANVAS].any(), "a token of a prompt is hidden"
    return noised.hidden_BCL[:, 0, -CANVAS:], noised.copy_weights_BCT[:, 0], numbers_BX


def test_a_weight_is_one_over_the_probability_of_hiding():
    hidden_BT, weights_BT, numbers_BX = hidden(50, 0.1)
    p_B1 = 0.9 * numbers_BX[:, :1] + 0.1
    assert torch.equal(hidden_BT, numbers_BX[:, 1:] < p_B1)
    assert torch.equal(weights_BT, hidden_BT / p_B1)
    assert weights_BT.max() <= 10


def test_weights_are_one_in_the_mean():
    """So the loss has the scale of a loss of single tokens, however many are hidden."""
    _, weights_BT, _ = hidden(40_000)
    assert weights_BT.mean().item() == pytest.approx(1.0, abs=0.02)


def test_least_of_one_hides_everything():
    hidden_BT, weights_BT, _ = hidden(3, 1.0)
    assert hidden_BT.all()
    assert torch.equal(weights_BT, torch.ones(3, CANVAS))


def test_stratified_shares_are_spread_evenly():
    _, _, numbers_BX = hidden(8, stratified=True)
    shares_B = numbers_BX[:, 0].sort().values
    torch.testing.assert_close(shares_B.diff(), torch.full((7,), 1 / 8))
    _, _, independent_BX = hidden(8)
    assert (independent_BX[:, 0].sort().values.diff() - 1 / 8).abs().max() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvas": 0}, "`likelihood.canvas` must be at least 1, got 0"),
        ({"canvas": 4, "least": 0.0}, r"`likelihood.least` must be in \(0, 1\], got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MaskedTokens(**options)
