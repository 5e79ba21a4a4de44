"""`PositionClip`: how it numbers actions, and which options it refuses."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.action_spaces import Actions
from lightning_mpo.objective.position_clip import PositionClip


def test_positions_count_the_actions_of_a_response():
    """The third action has the range √3: prompts' padding and gaps of the mask do not count."""
    mask = torch.tensor([[False, True, False, True, True]])
    log_ratios = torch.full((1, 5), 0.15)
    actions = Actions(log_ratios, torch.ones(1, 5), mask, mask.float())
    clip = PositionClip(low=0.1, high=0.1, dual=None)  # 0.1, 0.141, 0.173
    assert clip.clipped(actions).tolist() == [[False, True, False, True, False]]
    bounds = torch.tensor([0.1, 0.1 * 2**0.5, 0.15])
    torch.testing.assert_close(clip.loss(actions)[mask], -bounds.exp())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.0}, "`PositionClip.low` must be positive, got 0.0"),
        ({"high": -1.0}, "`PositionClip.high` must be positive, got -1.0"),
        ({"dual": 0.0}, "`PositionClip.dual` must be positive, got 0.0"),
        ({"power": 2.0}, "`PositionClip.power` must be a number from -1 to 1, got 2.0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        PositionClip(**options)
