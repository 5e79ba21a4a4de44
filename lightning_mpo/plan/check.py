"""Measures the peaks of one rollout with its updates and of a second one, as a plan assumes them.

The optimiser's state exists from the first update on, so only the second rollout is sampled beside
it.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_mpo.callbacks import KLTracking, MemoryAccounting, RolloutLoop
from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.plan.predict import Planner
from lightning_mpo.sampling import LocalSampler

MEASURED = (RolloutLoop, MemoryAccounting, KLTracking)
"""Callbacks that take part: those of the loop, of the measurement and of a reference."""


def measure(module: Any, data: Any, trainer: L.Trainer) -> dict[str, dict[str, int]]:
    """Return the peaks of each phase in bytes, above the process before it loads the policy.

    Returns:
        `in_use`, which a plan predicts: bytes of tensors on CUDA, else the resident set without
        free bytes of the heap; `held`: CUDA's reserved bytes, or the whole resident set.
    """
    # import all modules that the run needs, so that only its own memory is measured
    Planner(module, data, trainer).predict()
    # callbacks: the measurement behind all others
    callbacks = [callback for callback in callbacks_of(trainer) if isinstance(callback, MEASURED)]
    memory = next((c for c in callbacks if isinstance(c, MemoryAccounting)), MemoryAccounting())
    callbacks_of(trainer)[:] = [*(c for c in callbacks if c is not memory), memory]
    memory.write, memory.heap_every = False, 1
    trainer.loggers = []
    # one rollout with its updates, and the first update of the next
    rollout = next(c for c in callbacks if isinstance(c, RolloutLoop))
    rollout.epochs = 1
    trainer.fit_loop.epoch_loop.max_steps = rollout.minibatches + 1
    # responses of full length, and updates even if all rewards are equal
    if isinstance(rollout.sampler, LocalSampler):
        rollout.sampler.ignore_end_tokens = True
    module.skip_idle_updates = False
    trainer.fit(module, datamodule=data)
    # peaks above the baseline
    cuda, baseline = memory.watch.cuda, memory.baseline
    in_use, held = {}, {}
    for phase, peak in memory.watch.peaks.items():
        in_use[phase] = (peak.allocated if cuda else peak.in_use) - baseline
        held[phase] = peak.reserved if cuda else peak.resident - baseline
    return {"in_use": _join_update(in_use), "held": _join_update(held)}


def _join_update(peaks: dict[str, int]) -> dict[str, int]:
    """Join an update's forward and backward, which a plan predicts as one phase."""
    joined = {phase: peaks[phase] for phase in ("load", "rollout", "score", "optimiser")}
    return joined | {"update": max(peaks["forward"], peaks["backward"])}
