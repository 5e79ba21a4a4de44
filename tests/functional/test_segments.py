"""Numbers of segments against plain loops."""

import pytest
import torch

from lightning_mpo.functional.segments import above_quantile, find_return, number_segments

B, T = 40, 13


def draw(seed, ids=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-ids, ids, (B, T), generator=g) * 1000, torch.rand(B, T, generator=g) < 0.7


def loop_numbers(ids, mask, max_length):
    numbers, number, length = [], -1, 0
    for t in range(len(mask)):
        if mask[t]:
            same = t > 0 and mask[t - 1] and ids[t] == ids[t - 1] and length != max_length
            number, length = (number, length + 1) if same else (number + 1, 1)
        numbers.append(number if mask[t] else 0)
    return numbers


@pytest.mark.parametrize("max_length", [None, 1, 2, 3, T])
def test_numbers_are_the_definition(max_length):
    ids, mask = draw(0, ids=1)
    numbers = number_segments(ids, mask, max_length=max_length)
    assert numbers.dtype == torch.int64
    assert numbers.tolist() == [loop_numbers(ids[b], mask[b], max_length) for b in range(B)]
    kept = [
        sorted({n for n, m in zip(*row, strict=True) if m})
        for row in zip(numbers.tolist(), mask, strict=True)
    ]
    assert kept == [list(range(len(row))) for row in kept]


def test_ids_outside_the_mask_change_nothing():
    ids, mask = draw(1, ids=1)
    garbage = torch.where(mask, ids, torch.arange(T))
    assert torch.equal(number_segments(ids, mask), number_segments(garbage, mask))
    assert find_return(ids.fill_(4), mask) is None
    assert find_return(torch.where(mask, 4, torch.arange(T)), mask) is None


def loop_return(ids, mask):
    for b in range(len(ids)):
        seen, last = set(), None
        for t in range(ids.shape[1]):
            if not mask[b, t]:
                continue
            if int(ids[b, t]) in seen and int(ids[b, t]) != last:
                return b, t
            last = int(ids[b, t])
            seen.add(last)
    return None


@pytest.mark.parametrize("seed", range(30))
def test_a_return_is_found_where_a_loop_finds_it(seed):
    """Rows of distinct runs, in some of which one token has the number of another."""
    g = torch.Generator().manual_seed(seed)
    ids = (torch.rand(B, T, generator=g) < 0.5).long().cumsum(1) * 7 - 20
    mask = draw(seed)[1]
    assert find_return(ids, mask) is None
    at, source = (torch.randint(0, T, (3,), generator=g) for _ in range(2))
    rows = torch.randperm(B, generator=g)[:3]
    ids[rows, at] = ids[rows, source]
    assert find_return(ids, mask) == loop_return(ids, mask)


def test_returns_were_among_the_draws():
    ids, mask = draw(3)
    row, position = find_return(ids, mask)
    assert (row, position) == loop_return(ids, mask)
    ids[:row] = 0
    ids[row, position:] = -1
    assert find_return(ids, mask)[0] > row


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_above_a_quantile_is_what_torch_says_row_by_row(quantile):
    g = torch.Generator().manual_seed(5)
    values, mask = torch.rand(B, T, generator=g, dtype=torch.float64), draw(4)[1]
    mask[0] = False
    values[2] = values[2].round(decimals=1)  # ties
    above = above_quantile(torch.where(mask, values, torch.inf), mask, quantile)
    for b in range(B):
        kept = values[b][mask[b]]
        expected = kept > kept.quantile(quantile) if len(kept) else kept.bool()
        assert above[b][mask[b]].tolist() == expected.tolist()
    assert not (above & ~mask).any()
    assert torch.equal(above, above_quantile(torch.where(mask, values, -torch.inf), mask, quantile))


def test_equal_values_are_all_out():
    assert not above_quantile(
        torch.full((1, 5), 0.3), torch.ones(1, 5, dtype=torch.bool), 0.0
    ).any()


@pytest.mark.parametrize("T", [0, 1])
def test_the_shortest_responses(T):
    ids, mask = torch.zeros(2, T, dtype=torch.int64), torch.ones(2, T, dtype=torch.bool)
    assert number_segments(ids, mask, max_length=2).tolist() == [[0] * T] * 2
    assert find_return(ids, mask) is None
    assert above_quantile(ids.float(), mask, 0.5).tolist() == [[False] * T] * 2


def test_bad_arguments_are_refused_by_name():
    ids, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="`max_length` must be at least 1, got 0"):
        number_segments(ids, mask, max_length=0)
    with pytest.raises(ValueError, match=r"`quantile` must be in \[0, 1\], got 1.5"):
        above_quantile(ids.float(), mask, 1.5)
    with pytest.raises(ValueError, match="`mask_BT` must have shape"):
        number_segments(ids, mask[:, :2])
    with pytest.raises(ValueError, match="`mask_BT` must have shape"):
        find_return(ids, mask[:1])
