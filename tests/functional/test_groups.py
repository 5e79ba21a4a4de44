"""Which groups tell right from wrong."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.functional.groups import mixed_groups
from tests.support.builders import seeded


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_against_a_loop(size):
    right = torch.rand(40 * size, generator=seeded(size)) < 0.6
    judged = torch.rand(40 * size, generator=seeded(size + 9)) < 0.8
    expected, plain = [], []
    for p in range(40):
        rows = range(p * size, (p + 1) * size)
        expected.append({bool(right[i]) for i in rows if judged[i]} == {True, False})
        plain.append(0 < sum(bool(right[i]) for i in rows) < size)
    assert mixed_groups(right, size, valid_B=judged).tolist() == expected
    assert mixed_groups(right, size).tolist() == plain
    assert any(expected) == any(plain) == (size > 1)


def test_right_and_wrong_may_be_swapped_and_rows_of_a_group_too():
    right = torch.rand(60, generator=seeded(0)) < 0.5
    mixed = mixed_groups(right, 3)
    assert torch.equal(mixed_groups(~right, 3), mixed)
    assert torch.equal(mixed_groups(right.view(-1, 3).flip(1).flatten(), 3), mixed)


@pytest.mark.parametrize("size", [0, 4])
def test_parts_of_groups_are_refused(size):
    with pytest.raises(
        ValueError, match=f"`correct_mask_B` must hold whole groups of `group_size` = {size}, got 6"
    ):
        mixed_groups(torch.ones(6, dtype=torch.bool), size)
