"""Typed access to attributes of Lightning's trainer that its class does not declare."""

from __future__ import annotations

from typing import Any, cast

import lightning as L

from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """Return the list of callbacks itself, not a copy: changes of it change the trainer."""
    return cast("list[L.Callback]", cast(Any, trainer).callbacks)


def data_of(trainer: L.Trainer) -> L.LightningDataModule | None:
    """Return the data module; None: the trainer was given none."""
    return cast("L.LightningDataModule | None", cast(Any, trainer).datamodule)


def prompts_of(trainer: L.Trainer) -> PromptDataModule:
    """Return the data module, which must serve prompts.

    Raises:
        UserError: it is another kind of data module, or there is none.
    """
    data = data_of(trainer)
    if not isinstance(data, PromptDataModule):
        raise UserError("`data` must be a `PromptDataModule`, which serves the prompts")
    return data


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Return whether the trainer tries a few batches (`fast_dev_run`) and writes nothing."""
    return bool(cast(Any, trainer).fast_dev_run)
