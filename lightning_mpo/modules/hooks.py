"""Hooks for rollouts, which `RolloutLoop` calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L

from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.source import RolloutSource
from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.rollout.evaluation import Problem
from lightning_mpo.rollout.events import RolloutEvent
from lightning_mpo.sampling.base import Progress


class RolloutCallback(L.Callback):
    """A callback with further hooks, for rollouts."""

    def on_rollout_start(
        self, trainer: L.Trainer, module: PolicyOptimization, sequences: int, limit: int
    ) -> None:
        """Called before `sequences` responses of at most `limit` tokens are sampled."""

    def on_rollout_phase(self, phase: str) -> None:
        """Called when a phase begins, such as sampling, scoring or evaluation."""

    def on_rollout_tokens(self, tokens: int, running: int) -> None:
        """Called after each step of the sampler.

        Args:
            tokens: drawn in this step.
            running: rows that have not ended.
        """

    def on_evaluation_tokens(self, tokens: int, running: int) -> None:
        """Called likewise while held-out prompts are sampled, outside of rollouts."""

    def on_rollout_sampled(self, trainer: L.Trainer, module: PolicyOptimization) -> None:
        """Called after the sampling of a round, before rewards and scoring."""

    def on_rollout_end(
        self, trainer: L.Trainer, module: PolicyOptimization, event: RolloutEvent
    ) -> None:
        """Called once the experience is complete, before the first update on it."""

    def on_held_out_end(
        self,
        trainer: L.Trainer,
        module: PolicyOptimization,
        source: RolloutSource,
        problems: Mapping[str, Sequence[Problem]],
    ) -> None:
        """Called by all processes after the metrics of a validation or test were logged.

        Args:
            trainer: of the run.
            module: that was evaluated.
            source: the callback that sampled and judged.
            problems: results of the problems of this process, by the prefix of their metrics.
        """


def listeners(trainer: L.Trainer) -> list[RolloutCallback]:
    """Return the callbacks with rollout hooks."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, RolloutCallback)]


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
