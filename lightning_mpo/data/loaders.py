"""The loaders that Lightning asks a data module for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mpo.data.levels import Levels
from lightning_mpo.types import PromptBatch, PromptRow


class PromptLoaders(L.LightningDataModule, ABC):
    """Loads validation prompts in batches; training prompts have no loader here."""

    validation_batch_size: int
    """Prompts of a batch."""

    @property
    @abstractmethod
    def validation_rows(self) -> Sequence[PromptRow]:
        """The rows that validation takes."""

    @property
    def reported_levels(self) -> Levels | None:
        """Levels of the training rows, whose metrics are logged apart; None: there are none."""
        return None

    @property
    def benchmark_rows(self) -> Sequence[PromptRow]:
        """The rows on which published figures are measured: by default those of validation."""
        return self.validation_rows

    @abstractmethod
    def encode(self, rows: Sequence[PromptRow]) -> PromptBatch:
        """Tokenise prompts and pad them on the left."""

    def token_parts(self, rows: Sequence[PromptRow]) -> dict[str, Tensor]:
        """Return parts of the tokens of `solutions` whose means validation logs apart.

        Args:
            rows: of a batch.

        Returns:
            Masks by name, bool, shape `[B, T]`; none by default.
        """
        return {}

    def train_dataloader(self) -> Any:
        """Return the loader of the LightningModule, which only has a length.

        Lightning asks the data module for a loader before it asks the module.
        """
        if self.trainer is None:
            raise RuntimeError("the training loader exists within a trainer")
        return self.trainer.lightning_module.train_dataloader()

    def val_dataloader(self) -> DataLoader[PromptBatch]:
        """Return the loader of validation prompts in file order, a `PromptBatch` at a time.

        Batches are the same with any number of processes, and each has its first row's number.
        """
        starts: Any = range(0, len(self.validation_rows), self.validation_batch_size)
        collate: Any = self.validation_batch  # of one number, as there is no batch of batches
        return DataLoader(starts, batch_size=None, collate_fn=collate)

    def validation_batch(self, first: int) -> PromptBatch:
        """Return the batch of validation prompts that begins with a row."""
        rows = self.validation_rows[first : first + self.validation_batch_size]
        return replace(self.encode(rows), first=first)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Return the batch as it is: samplers move prompts, and micro-batches are on the device."""
        return batch

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader
