"""When a run is killed to verify its resume."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Kill:
    """When a run dies.

    Args:
        phase: an event of `KillAt`; "time": a share of the undisturbed run's seconds.
        at: which event, from 1; with "time", the seconds.
    """

    phase: str
    at: float

    def __str__(self) -> str:
        return f"time:{self.at:.2f}s" if self.phase == "time" else f"{self.phase}:{self.at:.0f}"


def draw_kills(
    draw: random.Random, count: int, events: dict[str, int], seconds: float
) -> list[Kill]:
    """Return kills of one run, in order; each falls into an equal share of the rest of the run."""
    phases = [*(phase for phase, n in events.items() if n), "time"]
    kills = []
    for i in range(count):
        phase, share = draw.choice(phases), 1 / (count - i)
        if phase == "time":
            kills.append(Kill(phase, draw.uniform(0.0, seconds * share)))
        else:
            kills.append(
                Kill(phase, draw.randint(1, max(1, round(events[phase] * share / (i + 1)))))
            )
    return kills
