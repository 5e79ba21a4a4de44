"""Saves of `ModelCheckpoint` at the end of updates, and with the mark that a resumed run needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


def model_checkpoints(trainer: L.Trainer) -> list[ModelCheckpoint]:
    """Return the callbacks of Lightning that save checkpoints by step or metric."""
    return [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
    ]


def wrap_saves(callback: ModelCheckpoint) -> None:
    """Replace the saving methods, so that a resumed run saves at the same steps."""
    methods: Any = callback
    methods.on_train_batch_end = _behind_updates(callback.on_train_batch_end)
    methods._save_checkpoint = partial(_save_marked, callback, callback._save_checkpoint)
    methods.on_train_end = partial(_save_end, callback, callback.on_train_end)


def _save_marked(
    callback: ModelCheckpoint, save: Callable[..., None], trainer: L.Trainer, filepath: str
) -> None:
    """Save with the mark that this step is saved, which a resumed run needs.

    Lightning sets the mark after the save.
    """
    callback._last_global_step_saved, callback._last_checkpoint_saved = (
        trainer.global_step,
        filepath,
    )
    save(trainer, filepath)


def _save_end(
    callback: ModelCheckpoint,
    hook: Callable[..., None],
    trainer: L.Trainer,
    pl_module: L.LightningModule,
) -> None:
    """Save the end of a run as `last`.

    Lightning leaves the save of the last validation there, if there was one.
    """
    hook(trainer, pl_module)
    if callback.save_last and not callback._should_skip_saving_checkpoint(trainer):
        kind, callback.save_last = callback.save_last, True  # a link would lead to an older file
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
        callback.save_last = kind


def _behind_updates(hook: Callable[..., None]) -> Callable[..., None]:
    """Delay a save to the end of the update, as gradients are in no checkpoint.

    The clock may ask for one within an update. So does Lightning at the first micro-batch of a
    resumed run: it has forgotten that the step is saved.
    """

    def on_train_batch_end(trainer: L.Trainer, *arguments: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            hook(trainer, *arguments)

    return on_train_batch_end
