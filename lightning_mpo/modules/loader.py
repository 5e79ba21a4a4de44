"""A training loader that only has a length: rollouts fill its batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class SlotLoader:
    """Yields `length` empty dicts.

    It is no torch DataLoader, so that Lightning puts no sampler into it; it has a length, as
    Lightning prefetches loaders without one, which would take rollouts from a policy one update
    old; and it keeps no position, as a loader that counts for itself restarts at 0 after a resume.

    Args:
        length: micro-batches in an epoch.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({} for _ in range(self.length))
