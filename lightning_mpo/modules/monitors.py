"""Checks of callbacks that watch a metric: its direction, and whether it is logged."""

from __future__ import annotations

import difflib
import re
from fnmatch import fnmatchcase
from typing import Any

import lightning as L

from lightning_mpo.errors import UserError
from lightning_mpo.modules.trainer import callbacks_of, is_fast_dev_run

HIGHER = re.compile(r"(pass|maj)(_at_|@)|reward(?!.*std)|accuracy|answered|kept_mass|(^|/)correct")
LOWER = re.compile(r"(^|/)loss|cross_entropy|(^|/)kl(/|$)|truncated|perplexity|grad_norm")
UNSUPPORTED = {
    "BatchSizeFinder": "a rollout fixes how many sequences there are; `lightning-mpo plan` "
    "says what fits",
    "LearningRateFinder": "a loss of reinforcement learning does not tell which learning rate "
    "is good",
    "BackboneFinetuning": "a policy has no `backbone`; `lora.targets` says which layers learn",
    "ModelPruning": "sampler and trainer would use different weights",
    "StochasticWeightAveraging": "it puts its own learning rate in place of the schedule; use "
    "`EMAWeightAveraging`",
}
"""Callbacks of Lightning that cannot work here, and why."""


def check_callbacks(trainer: L.Trainer, module: L.LightningModule | None = None) -> None:
    """Refuse callbacks that cannot work, or would keep the worst checkpoint.

    Args:
        trainer: with its callbacks.
        module: that will be trained; None: the one that is attached.

    Raises:
        UserError: a callback is unsupported, watches a metric in the wrong direction, or one that
            is never logged.
    """
    for callback in getattr(trainer, "callbacks", ()):
        name = type(callback).__name__
        if name in UNSUPPORTED and type(callback).__module__.startswith("lightning."):
            raise UserError(f"`{name}` is not supported: {UNSUPPORTED[name]}")
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor:
            check_direction(name, monitor, getattr(callback, "mode", None))
            _check_logged(trainer, module, name, monitor)


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
            f"`{owner}` watches `{monitor}` with `mode: {mode}` and would keep the worst: it is "
            f"better when {how}; give `mode: {better}`"
        )


EVALUATED = (
    *("pass_at_1", "reward", "judged", "answered", "length", "truncated"),
    *("pass_at_*", "maj_at_*"),
)
"""Metrics of held-out completions. Over a truncated support they are `val/support_…`."""
LOGGED: dict[str, tuple[str, ...]] = {
    "PolicyOptimization": (
        *(f"val/{name}" for name in EVALUATED),
        *(f"val/support_{name}" for name in EVALUATED),
        *(
            "loss/surrogate",
            "policy/entropy",
            "kl/*",
            "ratio/*",
            "trust/*",
            "pairs/*",
            "heads/*",
            "correction/*",
            "value/*",
        ),
        *(
            "optim/*",
            "reward/*",
            "rollout/*",
            "support/*",
            "memory/*",
            "throughput/*",
            "time/*",
        ),
    ),
    "SupervisedWarmup": ("loss", "val/loss"),
    "HeadWarmup": (
        "loss",
        "cross_entropy_*",
        "val/cross_entropy",
        "val/cross_entropy_*",
        "val/accuracy_*",
    ),
}
"""Metrics of a stage, and of the package's callbacks."""
OURS = ("lightning.", "lightning_mpo.")


def _check_logged(trainer: L.Trainer, module: Any, owner: str, monitor: str) -> None:
    """Refuse a metric that nothing logs.

    Without a class of the user's own, all logged metrics are known.
    """
    if is_fast_dev_run(trainer):
        return
    # validation metrics need a validation
    if monitor.startswith("val/") and trainer.limit_val_batches == 0:
        raise UserError(
            f"`{owner}` watches `{monitor}`, which is never logged: `trainer.limit_val_batches` "
            "is 0, so that nothing is validated"
        )
    # classes of others may log anything
    module = getattr(trainer, "lightning_module", None) if module is None else module
    parts = [type(part) for part in (module, *callbacks_of(trainer))]
    known = LOGGED.get(parts[0].__name__)
    if known is None or not all(part.__module__.startswith(OURS) for part in parts):
        return
    names = [name for name in known if not name.startswith("val/support") or _is_truncated(module)]
    if any(fnmatchcase(monitor, name) for name in names):
        return
    # the nearest name, by spelling or by last word
    plain = [name for name in names if "*" not in name]
    near = difflib.get_close_matches(monitor, plain, n=1, cutoff=0.5)
    word = re.split(r"[_/]", monitor)[-1]
    near = near or [name for name in plain if word in re.split(r"[@/]", name)][:1]
    there = (
        f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(plain)}, and others"
    )
    raise UserError(f"`{owner}` watches `{monitor}`, which no {parts[0].__name__} logs{there}")


def _is_truncated(module: Any) -> bool:
    support = module.objective.support
    return support != support.fixed
