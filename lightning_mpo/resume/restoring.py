"""Restores a checkpoint, or ends with a one-line error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import lightning as L

from lightning_mpo.errors import UserError
from lightning_mpo.resume.optimizer_states import check_optimizer, complete_options

STEPS = (
    "resume_start",
    "restore_datamodule",
    "restore_model",
    "restore_callbacks",
    "restore_training_state",
)
"""Lightning's steps of restoring, which load entries of a checkpoint without checks."""


@contextmanager
def restoring(path: object) -> Iterator[None]:
    """Turn any error of the block into a one-line error that names the checkpoint.

    Args:
        path: path of the checkpoint.

    Raises:
        UserError: the block raised an exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise UserError(
            f"the checkpoint {path} cannot be restored: an entry is not what such a run saves "
            f"({type(error).__name__}: {reason}); take another one"
        ) from error


def restore_in_one_line(trainer: L.Trainer) -> None:
    """Wrap a trainer's steps of restoring, so that a wrong entry gives a one-line error."""
    connector = trainer._checkpoint_connector
    for name in STEPS:
        step = getattr(connector, name)
        if not hasattr(step, "__wrapped__"):
            setattr(connector, name, _in_one_line(step, trainer))


def _in_one_line(step: Callable[..., Any], trainer: L.Trainer) -> Callable[..., Any]:
    @wraps(step)
    def run(*arguments: Any, **options: Any) -> Any:
        if not trainer.ckpt_path:
            return step(*arguments, **options)
        with restoring(trainer.ckpt_path):
            if step.__name__ == "restore_training_state":
                _check_optimizers(trainer)
                return _restore_training(trainer, step)
            return step(*arguments, **options)

    return run


def _restore_training(trainer: L.Trainer, step: Callable[..., Any]) -> None:
    """Run Lightning's step, then set options that the checkpoint lacks to this run's values."""
    optimizers = trainer.strategy.optimizers
    configured_groups = [
        [dict(group) for group in optimizer.param_groups] for optimizer in optimizers
    ]
    states = _optimizer_states(trainer) or []
    step()
    for optimizer, groups, state in zip(
        trainer.strategy.optimizers, configured_groups, states, strict=False
    ):
        complete_options(optimizer, groups, state["param_groups"])


def _optimizer_states(trainer: L.Trainer) -> list[Any] | None:
    """Return the states that Lightning is about to load, or None if it loads none."""
    content = trainer._checkpoint_connector._loaded_checkpoint
    if trainer.state.fn != "fit" or not trainer.strategy.lightning_restore_optimizer:
        return None
    return content.get("optimizer_states")


def _check_optimizers(trainer: L.Trainer) -> None:
    """Refuse optimiser states of another number or kind, which torch would load silently."""
    states = _optimizer_states(trainer)
    if states is None:
        return
    # one state for each optimiser
    optimizers, saved_count = trainer.strategy.optimizers, len(states)
    if saved_count != len(optimizers):
        raise ValueError(
            f"it holds the state of {saved_count} optimisers, and the run has {len(optimizers)}"
        )
    # kinds of the state's tensors, as noted at the save
    content = trainer._checkpoint_connector._loaded_checkpoint
    noted_kinds = content.get("callbacks", {}).get("ExactResume", {}).get("moments")
    if noted_kinds is not None and (
        not isinstance(noted_kinds, list) or len(noted_kinds) != saved_count
    ):
        raise ValueError(f"`moments` of ExactResume must describe {saved_count} optimisers")
    names = {id(weight): name for name, weight in trainer.lightning_module.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        kinds = None if noted_kinds is None else noted_kinds[i]
        check_optimizer(optimizer, states[i], kinds, names)
