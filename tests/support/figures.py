"""Figures of invented runs, one dictionary for each rollout, for the rules of the watchdog."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lightning_mpo.callbacks import Watchdog
from lightning_mpo.modules import PolicyOptimization

HEALTHY = {
    "policy/entropy": 1.0,
    "reward/accuracy": 0.4,
    "reward/answered": 0.9,
    "reward/judged": 1.0,
    "reward/mean": 0.4,
    "reward/std": 0.5,
    "rollout/groups_flat": 0.3,
    "rollout/length": 100.0,
    "rollout/repetition": 0.1,
    "rollout/truncated": 0.1,
}


def course(**last: list[float] | float) -> list[dict[str, float]]:
    """Return nine rollouts: three healthy ones, then `last`, whose single numbers stand for six equal ones.

    Args:
        last: values by metric, with `__` for a slash.
    """
    rollouts = [dict(HEALTHY) for _ in range(9)]
    for key, values in last.items():
        row = [values] * 6 if isinstance(values, int | float) else values
        for i, value in enumerate(row):
            rollouts[3 + i][key.replace("__", "/")] = float(value)
    return rollouts


def feed(watchdog: Watchdog, rollouts: list[dict[str, float]]) -> None:
    """Call the hooks of the watchdog as a trainer does: an update for each rollout, then a validation if due."""
    module = PolicyOptimization.__new__(PolicyOptimization)
    for figures in rollouts:
        trainer: Any = SimpleNamespace(
            callback_metrics=figures,
            optimizers=[SimpleNamespace(param_groups=[{"lr": figures.get("lr", 1.0)}])],
            sanity_checking=False,
        )
        watchdog._independent = [
            name for name in ("reward/accuracy", "reward/other") if name in figures
        ]
        batch = {"last_of_update": True, "last_of_rollout": True}
        watchdog.on_train_batch_end(trainer, module, None, batch, 0)
        if "val/pass_at_1" in figures:
            watchdog.on_validation_end(trainer, module)
