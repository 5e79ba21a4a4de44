"""Callbacks that watch a metric: in which direction it is better, and whether the run logs it at all."""

from __future__ import annotations

import difflib
import re
from typing import Any

import lightning as L

from lightning_mpo.errors import UserError

HIGHER = re.compile(r"pass@|reward(?!.*std)|accuracy|answered|kept_mass|(^|/)correct")
LOWER = re.compile(r"(^|/)loss|cross_entropy|(^|/)kl(/|$)|truncated|perplexity|grad_norm")
UNSUPPORTED = {
    "BatchSizeFinder": "a rollout fixes how many sequences there are; `lightning-mpo plan` says what fits",
    "LearningRateFinder": "a loss of reinforcement learning does not tell which learning rate is good",
    "BackboneFinetuning": "a policy has no `backbone`; `lora.targets` says which layers learn",
    "ModelPruning": "sampler and trainer would use different weights",
    "StochasticWeightAveraging": "it puts its own learning rate in place of the schedule; use `EMAWeightAveraging`",
}
"""Callbacks of Lightning that cannot work here, and why."""


def check_callbacks(trainer: L.Trainer) -> None:
    """Refuse callbacks that cannot work, and those that would keep the worst of what they watch.

    Raises:
        UserError: a callback is unsupported, watches a metric in the wrong direction, or one that is never logged.
    """
    for callback in getattr(trainer, "callbacks", ()):
        name = type(callback).__name__
        if name in UNSUPPORTED and type(callback).__module__.startswith("lightning."):
            raise UserError(f"`{name}` is not supported: {UNSUPPORTED[name]}")
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor:
            check_direction(name, monitor, getattr(callback, "mode", None))
            _check_validated(trainer, name, monitor)


def check_direction(owner: str, monitor: str, mode: Any) -> None:
    """Refuse `mode: min` of a metric that is better when it is higher, and the reverse.

    Args:
        owner: class of the callback.
        monitor: name of the metric.
        mode: `min` or `max`; anything else is not looked at.

    Raises:
        UserError: the mode is the wrong one.
    """
    metric = monitor.lower()
    better = "max" if HIGHER.search(metric) else "min" if LOWER.search(metric) else None
    if better is not None and mode in ("min", "max") and mode != better:
        how = "higher" if better == "max" else "lower"
        raise UserError(
            f"`{owner}` watches `{monitor}` with `mode: {mode}` and would keep the worst: it is better when {how}; "
            f"give `mode: {better}`"
        )


VALIDATED = ("val/pass@1", "val/reward", "val/length", "val/truncated", "val/loss", "val/cross_entropy")
"""Metrics of a validation; others that begin with `val/` may come from callbacks."""


def _check_validated(trainer: L.Trainer, owner: str, monitor: str) -> None:
    if not monitor.startswith("val/") or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.limit_val_batches == 0:
        raise UserError(
            f"`{owner}` watches `{monitor}`, which is never logged: `trainer.limit_val_batches` is 0, so that nothing is "
            "validated"
        )
    near = difflib.get_close_matches(monitor, VALIDATED, n=1, cutoff=0.8)
    if monitor not in VALIDATED and near:
        raise UserError(f"`{owner}` watches `{monitor}`, which no run logs; did you mean `{near[0]}`?")
