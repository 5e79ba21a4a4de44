"""Laws of every reduction: what is averaged over what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.objective.reductions import ConstantLength, Reduction, SequenceMean, TokenMean
from tests.support.builders import seeded, subclasses

B, U = 12, 9


def token_mean(losses: Tensor, weights: Tensor, _: Reduction) -> float:
    total = count = 0.0
    for row, w in zip(losses.tolist(), weights.tolist(), strict=True):
        for x, n in zip(row, w, strict=True):
            total, count = total + n * x, count + n
    return total / count


def sequence_mean(losses: Tensor, weights: Tensor, _: Reduction) -> float:
    means = []
    for row, w in zip(losses.tolist(), weights.tolist(), strict=True):
        if sum(w):
            means.append(sum(n * x for x, n in zip(row, w, strict=True)) / sum(w))
    return sum(means) / len(means)


def constant_length(losses: Tensor, weights: Tensor, reduction: Reduction) -> float:
    total = sum(
        n * x for x, n in zip(losses.flatten().tolist(), weights.flatten().tolist(), strict=True)
    )
    return total / (sum(1 for w in weights.tolist() if sum(w)) * reduction.length)


REDUCTIONS = [
    (TokenMean(), token_mean),
    (SequenceMean(), sequence_mean),
    (ConstantLength(7), constant_length),
]
each = pytest.mark.parametrize(
    ("reduction", "naive"), REDUCTIONS, ids=[type(r).__name__ for r, _ in REDUCTIONS]
)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return losses and whole-number weights; rows 3 and 4 are empty, lengths differ widely."""
    losses = torch.randn(B, U, generator=seeded(seed), dtype=torch.float64)
    weights = torch.randint(0, 4, (B, U), generator=seeded(seed + 1)).double()
    weights = torch.where(
        torch.arange(U) < torch.randint(1, U, (B, 1), generator=seeded(seed + 2)), weights, 0
    )
    weights[3:5] = 0
    weights[5] = 1
    return losses, weights


def reduce(
    reduction: Reduction, losses: Tensor, weights: Tensor, denominator: Tensor | None = None
) -> Tensor:
    denominator = reduction.denominator(weights) if denominator is None else denominator
    return (reduction.coefficients(weights) * losses).sum() / denominator


def test_the_list_has_every_reduction():
    assert subclasses(Reduction) == {type(r) for r, _ in REDUCTIONS}


@each
@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_loop(reduction, naive, seed):
    losses, weights = batch(seed)
    assert reduce(reduction, losses, weights).item() == pytest.approx(
        naive(losses, weights, reduction), rel=1e-12
    )


@each
@pytest.mark.parametrize("sizes", [(5, 5, 2), (1,) * B, (3, 2, 7)], ids=str)
def test_micro_batches_add_up_once_the_denominator_is_global(reduction, naive, sizes):
    losses, weights = batch()
    parts = list(zip(losses.split(sizes), weights.split(sizes), strict=True))
    denominator = sum(reduction.denominator(w) for _, w in parts)
    torch.testing.assert_close(denominator, reduction.denominator(weights))
    whole = reduce(reduction, losses, weights)
    torch.testing.assert_close(sum(reduce(reduction, x, w, denominator) for x, w in parts), whole)


@each
def test_empty_rows_count_nowhere(reduction, naive):
    losses, weights = batch()
    filled = weights.sum(1) > 0
    torch.testing.assert_close(
        reduce(reduction, losses, weights), reduce(reduction, losses[filled], weights[filled])
    )
    assert reduction.denominator(weights[~filled]) == 0
    assert not reduction.coefficients(weights[~filled]).any()


@each
def test_padding_and_order_change_nothing(reduction, naive):
    losses, weights = batch()
    order = torch.randperm(B, generator=seeded(9))
    pad = torch.nn.functional.pad
    moved = reduce(reduction, pad(losses[order], (0, 4), value=3.0), pad(weights[order], (0, 4)))
    torch.testing.assert_close(moved, reduce(reduction, losses, weights))


@each
def test_equal_losses_of_full_rows_reduce_to_themselves(reduction, naive):
    weights = torch.ones(4, 7).double()
    assert reduce(reduction, torch.full((4, 7), 2.5).double(), weights).item() == pytest.approx(2.5)


def test_constant_length_refuses_no_length():
    with pytest.raises(UserError, match=r"`ConstantLength.length` must be at least 1, got 0"):
        ConstantLength(0)
