"""Sizes of a run that its memory depends on, besides the model."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.objective.objective import Objective
from lightning_mpo.rollout.schedule import Schedule


@dataclass(frozen=True)
class Sizes:
    """Sizes of rollouts and updates on one process.

    Args:
        prompt: S, tokens of the longest prompt.
        response: T, tokens of the longest response.
        completions: G.
        rows: sequences of a rollout.
        copies: noised rows of a sequence in one pass over the rollout; 1 for a causal policy.
        passes: number of passes whose rows are stored; 1 if all passes have the same rows.
        together: sequences that are sampled at once.
        micro_rows: rows of a micro-batch.
        accumulate: True if gradients of earlier micro-batches are in memory.
    """

    prompt: int
    response: int
    completions: int
    rows: int
    copies: int
    passes: int
    together: int
    micro_rows: int
    accumulate: bool

    @property
    def trained_rows(self) -> int:
        """Rows of one pass over a rollout."""
        return self.rows * self.copies

    @classmethod
    def of(cls, rollout: RolloutLoop, schedule: Schedule, prompt: int) -> Sizes:
        """Read the sizes of a configuration; every response reaches its longest length.

        Args:
            rollout: the loop.
            schedule: how a rollout is spent in updates.
            prompt: tokens of the longest prompt.
        """
        cuts = schedule.minibatches * schedule.micro_batches
        unit = schedule.completions if schedule.whole_groups else 1
        together = getattr(rollout.sampler, "batch_size", None) or schedule.sequences
        return cls(
            prompt=prompt,
            response=rollout.max_new_tokens,
            completions=rollout.completions,
            rows=schedule.sequences,
            copies=schedule.copies or 1,
            passes=1 if schedule.copies is None else schedule.epochs,
            together=min(together, schedule.sequences),
            micro_rows=-(-schedule.rows // (cuts * unit)) * unit,
            accumulate=schedule.micro_batches > 1,
        )


def schedule_of(
    rollout: RolloutLoop, objective: Objective, micro_batches: int, world_size: int
) -> Schedule:
    """Return how a loop spends a rollout in updates, before a trainer runs."""
    likelihood = objective.likelihood
    return Schedule(
        rollout.prompts,
        rollout.completions,
        minibatches=rollout.minibatches,
        epochs=rollout.epochs,
        micro_batches=micro_batches,
        world_size=world_size,
        copies=None if likelihood is None else likelihood.repeats,
        whole_groups=objective.surrogate.compares_group,
    )
