"""What the module asks of the callback that rolls out, and what that callback tells the others.

It is declared here because callbacks may import modules, and not the other way round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import lightning as L

from lightning_mpo.rollout.base import Progress
from lightning_mpo.rollout.events import RolloutEvent
from lightning_mpo.types import Experience, PromptBatch

if TYPE_CHECKING:
    from lightning_mpo.modules.optimization import PolicyOptimization


class RolloutCallback(L.Callback):
    """A callback with further hooks, for rollouts."""

    def on_rollout_start(self, trainer: L.Trainer, module: PolicyOptimization, sequences: int, limit: int) -> None:
        """Called before `sequences` responses of at most `limit` tokens are sampled."""

    def on_rollout_phase(self, phase: str) -> None:
        """Called when a phase begins: sampling, reward function, scoring, all-reduce, evaluation."""

    def on_rollout_tokens(self, tokens: int, running: int) -> None:
        """Called after each step of the sampler with the tokens drawn and the rows still running."""

    def on_evaluation_tokens(self, tokens: int, running: int) -> None:
        """Called likewise while held-out prompts are sampled, outside of rollouts."""

    def on_rollout_sampled(self, trainer: L.Trainer, module: PolicyOptimization) -> None:
        """Called once the completions of a round are sampled, before anything judges or scores them."""

    def on_rollout_end(self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent) -> None:
        """Called once the experience is complete, before the first update on it."""


def listeners(trainer: L.Trainer) -> list[RolloutCallback]:
    """Return the callbacks with rollout hooks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback)]  # type: ignore[attr-defined]


def tell_phase(trainer: L.Trainer, phase: str) -> None:
    """Call `on_rollout_phase` of all callbacks with rollout hooks."""
    for callback in listeners(trainer):
        callback.on_rollout_phase(phase)


def evaluation_progress(trainer: L.Trainer) -> Progress:
    """Return the progress function for sampling of held-out prompts."""
    callbacks = listeners(trainer)

    def progress(tokens: int, running: int) -> None:
        for callback in callbacks:
            callback.on_evaluation_tokens(tokens, running)

    return progress


class RolloutSource(ABC):
    """Provides micro-batches to training and completions to the other verbs."""

    @property
    @abstractmethod
    def slots_per_epoch(self) -> int:
        """Micro-batches in a pass over the training prompts, a multiple of those of a rollout."""

    counter: int
    """Rollouts finished or under way."""

    @property
    @abstractmethod
    def experience(self) -> Experience:
        """What the updates under way are on."""

    @abstractmethod
    def validate(self, module: PolicyOptimization, prompts: PromptBatch, batch_idx: int) -> None:
        """Sample, score and log one batch of validation prompts."""

    @abstractmethod
    def predict(self, module: PolicyOptimization, prompts: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Sample one batch of prompts and return a record per completion."""
