"""Restores a checkpoint, or says in one line that it cannot be restored."""

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
"""Lightning's own steps, each of which takes entries of a checkpoint as they are."""


@contextmanager
def restoring(path: object) -> Iterator[None]:
    """Turn errors while restoring into one line on the checkpoint.

    Args:
        path: of the checkpoint.

    Raises:
        UserError: whatever was raised within.
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
    """Replace a trainer's restoring steps, so that a wrong entry ends in one line."""
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
    before = [
        [dict(group) for group in optimizer.param_groups]
        for optimizer in trainer.strategy.optimizers
    ]
    saved = _optimizer_states(trainer) or []
    step()
    for optimizer, groups, state in zip(trainer.strategy.optimizers, before, saved, strict=False):
        complete_options(optimizer, groups, state["param_groups"])


def _optimizer_states(trainer: L.Trainer) -> list[Any] | None:
    """Return the states that Lightning is about to load; None: it loads none."""
    content = trainer._checkpoint_connector._loaded_checkpoint
    if trainer.state.fn != "fit" or not trainer.strategy.lightning_restore_optimizer:
        return None
    return content.get("optimizer_states")


def _check_optimizers(trainer: L.Trainer) -> None:
    """Refuse states of optimisers that are too few or of another kind, which torch would take."""
    states = _optimizer_states(trainer)
    if states is None:
        return
    saved, own = len(states), len(trainer.strategy.optimizers)
    if saved != own:
        raise ValueError(f"it holds the state of {saved} optimisers, and the run has {own}")
    content = trainer._checkpoint_connector._loaded_checkpoint
    described = content.get("callbacks", {}).get("ExactResume", {}).get("moments")
    if described is not None and (not isinstance(described, list) or len(described) != saved):
        raise ValueError(f"`moments` of ExactResume must describe {saved} optimisers")
    names = {id(weight): name for name, weight in trainer.lightning_module.named_parameters()}
    for i, optimizer in enumerate(trainer.strategy.optimizers):
        check_optimizer(optimizer, states[i], None if described is None else described[i], names)
