"""What the module asks of the callback that rolls out, and what that callback tells the others.

It is declared here because callbacks may import modules, and not the other way round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from lightning_mpo.functional.support_diagnostics import could_not_stop
from lightning_mpo.rewards.base import Scores
from lightning_mpo.rollout.base import Progress
from lightning_mpo.rollout.dynamic import Account
from lightning_mpo.types import Experience, Finish, PromptBatch, Rollout

if TYPE_CHECKING:
    from lightning_mpo.modules.optimization import PolicyOptimization


@dataclass(frozen=True)
class RolloutEvent:
    """A finished rollout, as other callbacks see it.

    With dynamic sampling its rows, and so `reward/*`, `rollout/length` and `rollout/truncated`, are those that the rollout
    ended with: the groups that were kept, and dropped ones in places that stayed free. `account` is of all that was sampled.
    """

    counter: int
    experience: Experience
    scores: Scores
    sample_seconds: float
    prepare_seconds: float  # rewards, old and reference log-probs
    account: Account | None = None  # of dynamic sampling

    @property
    def tokens(self) -> int:
        """Response tokens of this rank."""
        return int(self.experience.rollout.response_mask_BT.sum())

    @property
    def sampled_tokens(self) -> int:
        """Response tokens that this rank sampled, those that dynamic sampling dropped among them."""
        return self.tokens if self.account is None else self.account.tokens

    @property
    def accuracy(self) -> float:
        """Share of right completions among those that this rank sampled and an accuracy reward judged."""
        if self.account is None:
            return float(self.scores.correct_B.sum()) / max(float(self.scores.decided_B.sum()), 1.0)
        return self.account.correct / max(self.account.decided, 1)

    def sums(self, ends: Sequence[int] = ()) -> dict[str, tuple[float, float]]:
        """By metric, (sum, count) over this rank's rows: they add up over ranks. The first one counts the judged rows.

        Args:
            ends: ids that end a response.
        """
        rollout, scores = self.experience.rollout, self.scores
        rewards_B, rows = scores.rewards_B.double(), float(len(scores.rewards_B))
        judged = float(scores.judged_B.sum())
        sums = {
            "reward/mean": (rewards_B.sum().item(), judged),
            "reward/square": (rewards_B.square().sum().item(), judged),
            "reward/judged": (judged, rows),
            "reward/accuracy": (float(scores.correct_B.sum()), float(scores.decided_B.sum())),
            "rollout/length": (float(self.tokens), rows),
            "rollout/truncated": (float(rollout.finish_B.sum()), rows),
            "rollout/groups_flat": _flat_groups(rollout.group_B, scores),
        }
        for name, values_B in scores.parts.items():
            sums[f"reward/{name}"] = (values_B.double().nansum().item(), float((~values_B.isnan()).sum()))
        return sums | _support_sums(rollout, ends) | ({} if self.account is None else self.account.sums())


def _flat_groups(group_B: Tensor, scores: Scores) -> tuple[float, float]:
    """Count the groups whose valid rewards are all equal, and all groups."""
    names, group_B = group_B.cpu().unique(return_inverse=True)
    rewards_B, valid_B = scores.rewards_B.double().cpu(), scores.valid_B.cpu()
    none = torch.zeros(len(names), dtype=torch.float64)
    lowest, highest = (
        none.scatter_reduce(0, group_B[valid_B], rewards_B[valid_B], how, include_self=False)
        for how in ("amin", "amax")
    )
    return float((lowest == highest).sum()), float(len(names))


def _support_sums(rollout: Rollout, ends: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Say how well the stored supports fit: mass kept, sampled tokens held, responses that could not stop."""
    mask_BT, sums = rollout.response_mask_BT, {}
    tokens = float(mask_BT.sum())
    if rollout.kept_mass_BT is not None:
        sums["support/kept_mass"] = (rollout.kept_mass_BT[mask_BT].double().sum().item(), tokens)
    if rollout.support_BTK is not None:
        missing = 0.0 if rollout.outside_BT is None else float(rollout.outside_BT.sum())
        sums["support/hit_rate"] = (tokens - missing, tokens)
        barred_B = could_not_stop(
            rollout.support_BTK, rollout.support_mask_BTK, mask_BT, rollout.finish_B == Finish.STOP, ends
        )
        sums["support/could_not_stop"] = (float(barred_B.sum()), float(len(barred_B)))
    return sums


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
