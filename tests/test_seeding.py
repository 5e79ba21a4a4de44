"""Streams of random numbers: no two share a seed, and those that recorded runs stand on are as they were."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lightning_mpo.seeding import PLAIN, Stream, generator_of, seed_of

ROLLOUTS, RANKS, ROUNDS = range(100), range(16), range(1, 10)
POSITIONS = {
    Stream.SHUFFLE: product(range(200)),
    Stream.SAMPLE: product(ROLLOUTS, RANKS),
    Stream.PLAN: product(ROLLOUTS, RANKS),
    Stream.REDRAW: product(ROLLOUTS, ROUNDS),
    Stream.RESAMPLE: product(ROLLOUTS, RANKS, ROUNDS),
    Stream.NOISE: product(ROLLOUTS, RANKS),
    Stream.DEMONSTRATE: product(range(1000)),
    Stream.DEMONSTRATE_HELD_OUT: product(range(100), RANKS),
    Stream.EVALUATE: product(range(1000)),
    Stream.REPORT: product(range(0, 1000, 8)),
    Stream.HEADS: product(ROLLOUTS, RANKS),
    Stream.HEADS_HELD_OUT: product(range(100), RANKS),
    Stream.DIAGNOSE: product(ROLLOUTS, RANKS),
    Stream.CURRICULUM: product(ROLLOUTS, ROUNDS),
    Stream.ANNOTATE: product(range(50), range(100)),
    Stream.CHECK: [()],
}


def test_no_two_streams_share_a_seed():
    assert set(POSITIONS) == set(Stream)
    seeds = [
        seed_of(seed, stream, *position)
        for stream, positions in POSITIONS.items()
        for position, seed in product(list(positions), (0, 1, 2, 42, 1234))
    ]
    assert len(seeds) == len(set(seeds)) > 80_000
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("stream", "position", "numbers"),
    [
        (Stream.SHUFFLE, (3,), (7, 3)),
        (Stream.SAMPLE, (3, 1), (7, 3, 1)),
        (Stream.PLAN, (3, 1), (7, 3, 1, 1)),
    ],
)
def test_recorded_runs_keep_their_numbers(stream, position, numbers):
    """The rule under which the runs of RESULTS.md sampled, selected and shuffled, written out."""
    expected = 0
    for number in numbers:
        expected = (expected * 1_000_003 + number + 1) % (2**63 - 1)
    assert stream in PLAIN
    assert seed_of(7, stream, *position) == expected
    assert torch.equal(
        generator_of(7, stream, *position).get_state(),
        torch.Generator().manual_seed(expected).get_state(),
    )


def test_other_streams_depend_on_seed_name_and_every_part_of_the_position():
    seeds = {
        seed_of(1, Stream.RESAMPLE, 1, 2, 3),
        seed_of(2, Stream.RESAMPLE, 1, 2, 3),
        seed_of(1, Stream.RESAMPLE, 1, 3, 2),
        seed_of(1, Stream.RESAMPLE, 12, 3),
        seed_of(1, Stream.RESAMPLE, 1, 23),
        seed_of(1, Stream.REDRAW, 1, 2, 3),
    }
    assert len(seeds) == 6
