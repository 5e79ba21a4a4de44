"""Which tokens of a response learn: against loops over its tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lightning_mpo.functional.selections import first_tokens, highest, sampled_tokens
from tests.support.builders import right_padded, seeded

MASK = right_padded([9, 0, 4, 12, 1, 7])
MASK[3, 4:6] = False  # a gap, such as the output of a tool
UNIFORM = torch.rand(MASK.shape, generator=seeded(0))


def scan(
    mask: list[bool], uniform: list[float], prefix: int, cap: int | None, probability: float
) -> list[bool]:
    """Walk from the left, as the formula says."""
    chosen, seen = [], 0
    for here, u in zip(mask, uniform, strict=True):
        room = cap is None or sum(chosen) < cap
        chosen.append(here and (seen < prefix or (room and u < probability)))
        seen += here
    return chosen


@pytest.mark.parametrize(("prefix", "cap"), [(0, None), (0, 3), (2, 4), (3, 3), (20, 30)])
@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_a_scan_chooses_what_a_loop_chooses(prefix, cap, probability):
    chosen = sampled_tokens(MASK, UNIFORM, prefix=prefix, cap=cap, probability=probability)
    for b in range(len(MASK)):
        assert chosen[b].tolist() == scan(
            MASK[b].tolist(), UNIFORM[b].tolist(), prefix, cap, probability
        )


@pytest.mark.parametrize("uniform_cap", [False, True])
def test_invariants_of_a_sample(uniform_cap):
    """The prefix whole, at most max(k, alpha) per row, none outside the mask: docs/algorithms.md 16.5, invariant 2."""
    chosen = sampled_tokens(
        MASK, UNIFORM, prefix=2, cap=5, probability=0.8, uniform_cap=uniform_cap
    )
    first = first_tokens(MASK, 2)
    assert torch.equal(chosen & first, first)
    assert torch.equal(first.sum(1), MASK.sum(1).clamp(max=2))
    assert (chosen.sum(1) <= 5).all()
    assert (chosen.sum(1) == 5).any()
    assert not (chosen & ~MASK).any()


def test_everything_is_chosen_at_probability_one_without_a_cap():
    assert torch.equal(sampled_tokens(MASK, UNIFORM, prefix=0, cap=None, probability=1.0), MASK)


def test_an_even_cap_prefers_no_position_and_a_scan_the_first_ones():
    """5 tokens, P = 0.6, cap 2: each is kept equally often by one, less and less often by the other."""
    rows = 20_000
    mask, uniform = torch.ones(rows, 5, dtype=torch.bool), torch.rand(rows, 5, generator=seeded(1))
    options = {"prefix": 0, "cap": 2, "probability": 0.6}
    even = sampled_tokens(mask, uniform, **options, uniform_cap=True)
    left = sampled_tokens(mask, uniform, **options)
    assert torch.equal(even.sum(1), left.sum(1))
    shares = even.double().mean(0)
    # five standard errors of a share of 0.39 in 20,000 rows are 0.017: a false alarm in 3e-6 of generators
    assert (shares - shares.mean()).abs().max() < 0.017
    falling = left.double().mean(0)
    assert falling[0] - falling[-1] > 0.3


def test_pairs_under_an_even_cap_are_equally_likely():
    rows = 30_000
    mask, uniform = torch.ones(rows, 4, dtype=torch.bool), torch.rand(rows, 4, generator=seeded(2))
    chosen = sampled_tokens(mask, uniform, prefix=0, cap=2, probability=1.0, uniform_cap=True)
    pairs = Counter(tuple(row.nonzero()[:, 0].tolist()) for row in chosen)
    assert set(map(len, pairs)) == {2}
    assert len(pairs) == 6
    assert (
        sum((n - rows / 6) ** 2 / (rows / 6) for n in pairs.values()) < 37.1
    )  # chi-square, 5 degrees: 6e-7


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0, 1e-6])
def test_the_highest_values_are_those_of_a_sort(share):
    values = torch.randn(MASK.shape, generator=seeded(3)).masked_fill(~MASK, float("nan"))
    chosen = highest(values, MASK, share=share)
    for b in range(len(MASK)):
        where = MASK[b].nonzero()[:, 0].tolist()
        count = -(-len(where) * share // 1)
        best = sorted(where, key=lambda t: -values[b, t].item())[: int(count)]
        assert chosen[b].nonzero()[:, 0].tolist() == sorted(best)


def test_of_equal_values_the_earlier_ones_are_chosen():
    assert highest(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), share=0.5).tolist() == [
        [True, True, False, False]
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": -1, "cap": None, "probability": 0.5}, "`prefix` must be >= 0"),
        ({"prefix": 0, "cap": None, "probability": 0.0}, "`probability` in"),
        ({"prefix": 3, "cap": 2, "probability": 0.5}, "`cap` must not be below `prefix`"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampled_tokens(MASK, UNIFORM, **options)
    with pytest.raises(ValueError, match="`share` must be in"):
        highest(UNIFORM, MASK, share=0.0)
