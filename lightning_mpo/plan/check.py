"""Runs one rollout with its updates and a second one as the plan assumes them, and prints the measured peaks as JSON.

The second rollout is sampled beside the optimiser's state, which the first is not.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_mpo.callbacks import KLTracking, MemoryAccounting, RolloutLoop
from lightning_mpo.plan.predict import Planner

KEPT = (RolloutLoop, MemoryAccounting, KLTracking)


def measure(module: Any, data: Any, trainer: L.Trainer) -> dict[str, dict[str, int]]:
    """Return the peaks of each phase above the process as it was before loading, in bytes.

    Returns:
        `in_use`, which a plan predicts: of tensors on CUDA, else of the resident set without what the heap keeps free;
        `held`: what the allocator takes for it, of CUDA's reserved bytes or the whole resident set.
    """
    Planner(
        module, data, trainer
    ).predict()  # imports all that the run needs, so that only its own memory is measured
    machine: Any = trainer
    kept = [
        c for c in machine.callbacks if isinstance(c, KEPT)
    ]  # KLTracking asks for a reference, which takes part
    memory = next((c for c in kept if isinstance(c, MemoryAccounting)), MemoryAccounting())
    machine.callbacks = [c for c in kept if c is not memory] + [memory]
    memory.heap_every = 1
    trainer.loggers = []
    rollout = next(c for c in kept if isinstance(c, RolloutLoop))
    rollout.epochs = 1
    trainer.fit_loop.epoch_loop.max_steps = rollout.minibatches + 1
    policy: Any = module.policy
    policy.__class__ = type("Endless", (type(policy),), {"end_tokens": property(lambda self: [])})
    object.__setattr__(
        module.objective, "idle", lambda denominators: False
    )  # equal rewards are measured all the same
    memory._write = lambda folder: None  # type: ignore[method-assign]
    trainer.fit(module, datamodule=data)
    peaks, cuda = memory.watch.peaks, memory.watch.cuda
    in_use = {
        name: (peak.allocated if cuda else peak.in_use) - memory.baseline
        for name, peak in peaks.items()
    }
    held = {
        name: peak.reserved if cuda else peak.resident - memory.baseline
        for name, peak in peaks.items()
    }
    return {"in_use": _update_as_one(in_use), "held": _update_as_one(held)}


def _update_as_one(peaks: dict[str, int]) -> dict[str, int]:
    """Name phases as a plan does, which does not tell an update's forward from its backward."""
    kept = {phase: peaks[phase] for phase in ("load", "rollout", "score", "optimiser")}
    return kept | {"update": max(peaks["forward"], peaks["backward"])}
