"""Laws of every selection: which tokens carry gradient."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.selection import AllTokens, HighEntropyTokens, SampledTokens, Selection
from tests.helpers import right_padded, seeded, subclasses

SELECTIONS = [
    AllTokens(),
    SampledTokens(prefix=2, cap=4, probability=0.5),
    SampledTokens(prefix=0, cap=3, probability=0.5, cap_mode="uniform"),
    SampledTokens(prefix=1, cap=None, probability=0.4, unbiased=True),
    HighEntropyTokens(0.4),
]
each = pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: f"{type(s).__name__}{list(vars(s).values())}")
MASK = right_padded([5, 0, 8, 1, 3])
ENTROPY = torch.rand(MASK.shape, generator=seeded(5))


def test_the_list_has_every_selection():
    assert subclasses(Selection) == {type(s) for s in SELECTIONS}


@each
def test_only_response_tokens_are_chosen_with_the_same_generator_the_same_ones(selection):
    before = MASK.clone()
    weights = selection.choose(MASK, seeded(0), ENTROPY)
    assert weights.is_floating_point()
    assert (weights >= 0).all()
    assert not weights[~MASK].any()
    assert torch.equal(selection.choose(MASK, seeded(0), ENTROPY), weights)
    assert torch.equal(MASK, before)


def test_all_tokens_weigh_one():
    assert torch.equal(AllTokens().choose(MASK, seeded(0)), MASK.float())
