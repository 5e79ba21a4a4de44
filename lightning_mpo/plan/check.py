"""Runs two updates of a configuration as the plan assumes them and prints the measured peaks as JSON.

Run by `lightning-mpo plan --check` in a process of its own: python -m lightning_mpo.plan.check -c CONFIG …
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from lightning_mpo.callbacks import KLTracking, MemoryAccounting, Rollout
from lightning_mpo.plan.command import build
from lightning_mpo.plan.predict import Planner

KEPT = (Rollout, MemoryAccounting, KLTracking)


def measure(arguments: list[str]) -> dict[str, int]:
    """Return the peak of each phase above the process as it was before loading, in bytes."""
    module, data, trainer = build(arguments)
    Planner(module, data, trainer).predict()  # imports all that the run needs, so that only its own memory is measured
    machine: Any = trainer
    kept = [c for c in machine.callbacks if isinstance(c, KEPT)]  # KLTracking asks for a reference, which takes part
    memory = next((c for c in kept if isinstance(c, MemoryAccounting)), MemoryAccounting())
    machine.callbacks = [c for c in kept if c is not memory] + [memory]
    trainer.loggers = []
    trainer.fit_loop.epoch_loop.max_steps = 2
    policy: Any = module.policy
    policy.__class__ = type("Endless", (type(policy),), {"end_tokens": property(lambda self: [])})
    memory._write = lambda folder: None  # type: ignore[method-assign]
    trainer.fit(module, datamodule=data)
    peaks = memory.peaks()
    found = {phase: peaks[phase] - memory.baseline for phase in ("load", "rollout", "score", "optimiser")}
    return found | {"update": max(peaks["forward"], peaks["backward"]) - memory.baseline}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        peaks = measure(sys.argv[1:])
    print(json.dumps(peaks))
