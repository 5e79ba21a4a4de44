"""Keeps a run ended that `EarlyStopping` has ended; Lightning's checkpoints do not say that one has."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info


def patiences(trainer: L.Trainer) -> list[tuple[EarlyStopping, int]]:
    """Return the `EarlyStopping` of a run, each with its `patience`."""
    return [(callback, callback.patience) for callback in trainer.early_stopping_callbacks]


def keep_stopped(
    trainer: L.Trainer, configured: Iterable[tuple[EarlyStopping, int]], changed: Iterable[str]
) -> None:
    """End a run whose checkpoint was saved after `EarlyStopping` had ended it.

    A run with other options of `EarlyStopping` goes on, as they may be changed for this reason.

    Args:
        trainer: with restored callbacks.
        configured: `patiences` before Lightning put those of the checkpoint in their place.
        changed: paths of the options that are not those of the checkpoint.
    """
    for callback, patience in configured:
        callback.patience = patience
        is_changed = any(path.startswith("callbacks.EarlyStopping") for path in changed)
        if callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED and not is_changed:
            trainer.should_stop = True
            rank_zero_info(
                f"resume     EarlyStopping on {callback.monitor!r} has ended this run: nothing is "
                "left to train; change its options to go on"
            )
