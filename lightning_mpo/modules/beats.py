"""The last reports of all processes, and the sentence on those that the others wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """The last report of a process.

    Args:
        count: phases that the process has begun. The others wait for the lowest count.
        phase: name of the phase under way.
        seconds: time since the phase began or last made progress.
        silent: seconds since the report came, by the clock of the process that reads it.
        gave_up: whether the process has printed its part and is about to exit.
    """

    count: int
    phase: str
    seconds: float
    silent: float = 0.0
    gave_up: bool = False


def describe(beats: Sequence[Beat | None], patience: float) -> str:
    """Return a sentence on the processes that others wait for, and their phases.

    Args:
        beats: the last report of each rank; None where no report has come.
        patience: seconds of silence after which a process counts as gone.

    Example:
        >>> describe([Beat(8, "all-reduce", 40.2), Beat(7, "reward function", 41.4)], 30.0)
        'rank 1: reward function, 41 s; waiting for it: rank 0 (all-reduce, 40 s)'
    """
    # silent ranks; of the others, those with the fewest phases are awaited
    silent = [rank for rank, beat in enumerate(beats) if beat is None or beat.silent > patience]
    alive = {
        rank: beat for rank, beat in enumerate(beats) if beat is not None and rank not in silent
    }
    slowest_first = sorted(alive, key=lambda rank: (alive[rank].count, -alive[rank].seconds))
    fewest = alive[slowest_first[0]].count if slowest_first else 0
    awaited = [] if silent else [rank for rank in slowest_first if alive[rank].count == fewest]
    waiting = [rank for rank in slowest_first if rank not in awaited]
    # at most eight ranks that hold the run up
    causes = [f"rank {rank}: {_describe_silence(beats[rank])}" for rank in silent]
    causes += [f"rank {rank}: {alive[rank].phase}, {alive[rank].seconds:.0f} s" for rank in awaited]
    text = "; ".join(causes[:8]) + (f"; and {len(causes) - 8} more" if len(causes) > 8 else "")
    if not waiting:
        return text
    # at most four ranks that wait
    waiting_text = ", ".join(
        f"rank {rank} ({alive[rank].phase}, {alive[rank].seconds:.0f} s)" for rank in waiting[:4]
    )
    more = f" and {len(waiting) - 4} more" if len(waiting) > 4 else ""
    return f"{text}; waiting for {'it' if len(causes) == 1 else 'them'}: {waiting_text}{more}"


def _describe_silence(beat: Beat | None) -> str:
    if beat is None:
        return "no sign of life"
    return f"no sign of life for {beat.silent:.0f} s, last in {beat.phase}"
