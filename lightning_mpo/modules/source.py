"""The interface through which `PolicyOptimization` uses the callback that makes rollouts.

It is declared below both, so that neither imports the other; `module` is a `PolicyOptimization`
throughout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L

from lightning_mpo.types import Experience, PromptBatch


class RolloutSource(L.Callback, ABC):
    """Provides micro-batches to training and completions to the other verbs."""

    @property
    @abstractmethod
    def slots_per_epoch(self) -> int:
        """Micro-batches in a pass over the training prompts, a multiple of those of a rollout."""

    prompts: int
    completions: int
    minibatches: int
    epochs: int
    counter: int
    """Rollouts finished or under way."""

    @property
    @abstractmethod
    def experience(self) -> Experience:
        """The experience that the present updates use."""

    @abstractmethod
    def validate(self, module: Any, prompts: PromptBatch, batch_idx: int) -> None:
        """Sample, score and log one batch of validation prompts."""

    @abstractmethod
    def predict(self, module: Any, prompts: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Sample one batch of prompts and return a record per completion."""
