"""Checks that the batch limits of the trainer are multiples of a rollout."""

from __future__ import annotations

import lightning as L

from lightning_mpo.errors import UserError
from lightning_mpo.modules.trainer import is_fast_dev_run
from lightning_mpo.rollout.schedule import Schedule


def fit_limits(trainer: L.Trainer, schedule: Schedule) -> None:
    """Check the trainer's batch limits, and convert its validation interval to micro-batches.

    Raises:
        UserError: a limit within a rollout, or an interval over epochs.
    """
    quick = is_fast_dev_run(trainer)
    limit = trainer.limit_train_batches
    if not quick and isinstance(limit, int) and limit % schedule.slots:
        raise UserError(
            f"`trainer.limit_train_batches` ({limit}) must be a multiple of a rollout's "
            f"{schedule.slots} micro-batches"
        )
    if isinstance(limit, float) and limit != 1.0:
        raise UserError(
            "`trainer.limit_train_batches` must be a whole number of micro-batches, not a share"
        )
    every = trainer.val_check_interval
    if isinstance(every, float) and every != 1.0:
        raise UserError(
            f"`trainer.val_check_interval` must be a whole number of updates, got {every}: a "
            "share of an epoch may end within an update; set `trainer.check_val_every_n_epoch: "
            "null` with it"
        )
    if isinstance(every, int) and not quick:
        if trainer.check_val_every_n_epoch is not None:
            raise UserError(
                "`trainer.val_check_interval` counts updates over the whole run: set "
                "`trainer.check_val_every_n_epoch: null` with it"
            )
        trainer.val_check_interval = (
            every * schedule.micro_batches
        )  # Lightning counts micro-batches
