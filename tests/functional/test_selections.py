"""Which tokens learn, against loops from the left and sorts, and by enumeration where chance decides."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_mpo.functional.selections import first_tokens, highest, sampled_tokens
from tests.helpers import seeded

B, T = 40, 14
MASK = torch.rand(B, T, generator=seeded(0)) < 0.8  # with gaps
MASK[0], MASK[1] = False, True
UNIFORM = torch.rand(B, T, generator=seeded(1))


def scan(mask, uniform, prefix, cap, probability):
    """related specification 1.1, one token after the other."""
    chosen = [[False] * len(row) for row in mask]
    for b, row in enumerate(mask):
        seen = kept = 0
        for t, inside in enumerate(row):
            if not inside:
                continue
            if seen < prefix or (uniform[b][t] < probability and (cap is None or kept < cap)):
                chosen[b][t] = True
                kept += 1
            seen += 1
    return torch.tensor(chosen)


@pytest.mark.parametrize("prefix", [0, 2, 30])
@pytest.mark.parametrize("room", [0, 1, 4, None])
@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_the_choice_is_a_scan_from_the_left(prefix, room, probability):
    cap = None if room is None else prefix + room
    chosen = sampled_tokens(MASK, UNIFORM, prefix=prefix, cap=cap, probability=probability)
    assert torch.equal(chosen, scan(MASK.tolist(), UNIFORM.tolist(), prefix, cap, probability))


@pytest.mark.parametrize("uniform_cap", [False, True])
def test_prefixes_are_whole_and_caps_are_kept(uniform_cap):  # related specification 1.5, invariant 2
    prefix, cap = 3, 6
    chosen = sampled_tokens(MASK, UNIFORM, prefix=prefix, cap=cap, probability=0.7, uniform_cap=uniform_cap)
    assert not (chosen & ~MASK).any()
    assert chosen.sum(1).max() == cap
    head = first_tokens(MASK, prefix)
    assert torch.equal(head.sum(1), MASK.sum(1).clamp(max=prefix))
    assert torch.equal(chosen & head, head)
    drawn = MASK & (UNIFORM < 0.7) & ~head
    assert torch.equal(chosen.sum(1), head.sum(1) + drawn.sum(1).clamp(max=cap - prefix))
    assert not (chosen & ~head & ~drawn).any()


def test_a_uniform_cap_prefers_no_position_where_a_scan_prefers_the_first():
    """Of 12 later tokens 4 may stay: each is as probable as any other, chi-square with 11 degrees of freedom."""
    rows, width = 20_000, 14
    mask = torch.ones(rows, width, dtype=torch.bool)
    uniform = torch.rand(rows, width, generator=seeded(2))
    options = {"prefix": 2, "cap": 6, "probability": 0.9}
    counts = sampled_tokens(mask, uniform, **options, uniform_cap=True).sum(0)[2:].double()
    expected = counts.mean()
    assert ((counts - expected) ** 2 / expected).sum() < 31.3  # p = 0.001; without replacement it is smaller still
    first = sampled_tokens(mask, uniform, **options).sum(0)[2:]
    assert first[0] > 0.88 * rows
    assert first[-1] < 0.01 * rows


def test_a_uniform_cap_takes_every_subset_alike():
    """All orders of four uniform numbers: each pair of two is left over equally often."""
    orders = torch.tensor(list(itertools.permutations([0.1, 0.2, 0.3, 0.4])))
    mask = torch.ones_like(orders, dtype=torch.bool)
    chosen = sampled_tokens(mask, orders, prefix=0, cap=2, probability=0.5, uniform_cap=True)
    pairs = [tuple(row.nonzero()[:, 0].tolist()) for row in chosen]
    assert {pairs.count(pair) for pair in itertools.combinations(range(4), 2)} == {4}


def test_sampled_means_are_unbiased():  # related specification 1.5, invariant 3
    length, probability, draws = 9, 0.3, 40_000
    values = torch.randn(length, generator=seeded(3), dtype=torch.float64) + 2
    mask = torch.ones(draws, length, dtype=torch.bool)
    chosen = sampled_tokens(
        mask, torch.rand(draws, length, generator=seeded(4)), prefix=0, cap=None, probability=probability
    )
    estimates = (chosen * values).sum(1) / (probability * length)
    error = estimates.std() / math.sqrt(draws)
    assert abs(estimates.mean() - values.mean()) < 4 * error
    assert error < 0.01 * values.mean()


@pytest.mark.parametrize("share", [0.01, 0.2, 1 / 3, 0.5, 1.0])
def test_the_highest_are_the_first_of_a_sort(share):
    values = torch.randint(0, 4, (B, T), generator=seeded(5)).double()  # many equal ones
    chosen = highest(torch.where(MASK, values, torch.nan), MASK, share=share)
    for b in range(B):
        where = [t for t in range(T) if MASK[b, t]]
        ranked = sorted(where, key=lambda t, b=b: (-values[b, t].item(), t))
        wanted = ranked[: math.ceil(share * len(where) - 1e-9)]
        assert chosen[b].nonzero()[:, 0].tolist() == sorted(wanted)


def test_at_least_one_token_of_a_response_is_among_the_highest():
    assert torch.equal(highest(UNIFORM, MASK, share=1e-3).sum(1), MASK.any(1).long())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampled_tokens(MASK, UNIFORM, prefix=-1, cap=None, probability=0.5), "`prefix` must be >= 0"),
        (lambda: sampled_tokens(MASK, UNIFORM, prefix=0, cap=None, probability=0.0), r"`probability` in \(0, 1\]"),
        (lambda: sampled_tokens(MASK, UNIFORM, prefix=3, cap=2, probability=0.5), r"`cap` must not be below `prefix`"),
        (lambda: sampled_tokens(MASK, UNIFORM[:, 1:], prefix=0, cap=None, probability=0.5), "uniform_BT"),
        (lambda: highest(UNIFORM, MASK, share=0.0), r"`share` must be in \(0, 1\], got 0.0"),
        (lambda: highest(UNIFORM[:, 1:], MASK, share=0.5), "mask_BT"),
    ],
)
def test_options_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
