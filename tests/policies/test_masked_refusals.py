"""Models and requests that a masked policy refuses, each in one line before weights load."""

from __future__ import annotations

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyMaskedPolicy
from lightning_mpo.scores import ScoreRequest


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ScoreRequest(future=2), "a masked policy has no next one"),
        (ScoreRequest(values=True), "`ValueLoss` fits a critic"),
        (ScoreRequest(candidates=True), "scores the tokens of a response alone"),
        (ScoreRequest(support_logits=True), "scores the tokens of a response alone"),
    ],
)
def test_scores_of_causal_models_are_refused(request_, message):
    with pytest.raises(UserError, match=message):
        TinyMaskedPolicy().check(request_)
