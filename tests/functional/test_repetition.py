"""The share of repeated n-grams, against sets of tuples."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.functional.repetition import repeated_share
from tests.support.builders import seeded


def by_sets(tokens: list[int], counts: list[bool], n: int) -> float:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1) if all(counts[i : i + n])]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@pytest.mark.parametrize("n", [1, 2, 4])
def test_it_counts_as_sets_do(n):
    tokens_BT = torch.randint(0, 3, (6, 40), generator=seeded(0))
    tokens_BT[0], tokens_BT[1] = 7, torch.arange(40)
    lengths_B = torch.tensor([40, 40, 40, 17, n, 0])
    mask_BT = torch.arange(40) < lengths_B[:, None]
    mask_BT[2, 11] = False  # a gap
    expected = [
        by_sets(row, counts, n)
        for row, counts in zip(tokens_BT.tolist(), mask_BT.tolist(), strict=True)
    ]
    assert repeated_share(tokens_BT, mask_BT, n).tolist() == pytest.approx(expected)
    assert expected[0] > 0.9
    assert expected[1] == expected[4] == expected[5] == 0


def test_padding_does_not_count_and_short_responses_repeat_nothing():
    tokens_BT = torch.tensor([[5, 6, 7, 8, 0, 0, 0, 0, 0, 0]])
    assert repeated_share(tokens_BT, tokens_BT > 0).tolist() == [0.0]
    assert repeated_share(tokens_BT[:, :3], tokens_BT[:, :3] > 0).tolist() == [0.0]


def test_order_and_large_ids_matter():
    tokens_BT = torch.tensor([[1, 2, 2, 1, 151_935, 151_934, 151_934, 151_935]])
    assert repeated_share(tokens_BT, tokens_BT > 0, n=2).tolist() == [0.0]


def test_shapes_and_n_are_checked():
    tokens_BT = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="mask_BT"):
        repeated_share(tokens_BT, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        repeated_share(tokens_BT, tokens_BT > 0, n=0)
