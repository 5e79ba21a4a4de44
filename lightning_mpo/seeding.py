"""Named random streams: each is a pure function of a seed, its name and a position, so that nothing
has to be carried.
"""

from __future__ import annotations

import hashlib
from enum import Enum

import torch


class Stream(Enum):
    """What random numbers are drawn for, and what their position is."""

    SHUFFLE = "order of the training rows: epoch"
    SAMPLE = "responses of a rollout: rollout, rank"
    PLAN = "token selections and mini-batches of a rollout: rollout, rank"
    REDRAW = "prompts of the later rounds of dynamic sampling: rollout, round"
    CURRICULUM = "rows that a curriculum draws: rollout, round"
    RESAMPLE = "responses of the later rounds of dynamic sampling: rollout, rank, round"
    NOISE = "hidden tokens of noised copies: rollout, rank"
    DEMONSTRATE = "hidden tokens of demonstrations: batch"
    DEMONSTRATE_HELD_OUT = "hidden tokens of held-out demonstrations: batch, rank"
    EVALUATE = "responses of validation, test, prediction and `evaluate`: first row"
    REPORT = "responses of the evaluation before and after a run: first row"
    HEADS = "responses that multi-token heads are warmed up on: pool, rank"
    HEADS_HELD_OUT = "responses that warmed-up heads are validated on: batch, rank"
    DIAGNOSE = "states and continuations that multi-token heads are measured on: rollout, rank"
    ANNOTATE = "thoughts that are written into files: file"
    CHECK = "responses and tokens that an export is compared on"


PLAIN: dict[Stream, tuple[int, ...]] = {Stream.SHUFFLE: (), Stream.SAMPLE: (), Stream.PLAN: (1,)}
"""Streams whose generators are seeded with seed, position and these numbers alone: recorded runs
stand on them.
"""


def generator_of(seed: int, stream: Stream, *position: int) -> torch.Generator:
    """Return the generator of a stream at a position.

    Args:
        seed: of the run, or of the data.
        stream: what the numbers are for.
        position: small integers, as the stream names them.

    Example:
        >>> first = torch.rand(1, generator=generator_of(0, Stream.SAMPLE, 3, 1))
        >>> bool(torch.rand(1, generator=generator_of(0, Stream.SAMPLE, 3, 1)) == first)
        True
        >>> bool(torch.rand(1, generator=generator_of(0, Stream.RESAMPLE, 3, 1, 1)) == first)
        False
    """
    return torch.Generator().manual_seed(seed_of(seed, stream, *position))


def seed_of(seed: int, stream: Stream, *position: int) -> int:
    """Return the number that a stream's generator is seeded with, below 2^63."""
    if stream in PLAIN:
        value = 0
        for number in (seed, *position, *PLAIN[stream]):
            value = (value * 1_000_003 + number + 1) % (2**63 - 1)
        return value
    text = f"{stream.name} {seed} {' '.join(map(str, position))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def is_held_out(prompt: str, share: float) -> bool:
    """Return whether the hash of a prompt puts it on the held-out side."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") < share * 2**64
