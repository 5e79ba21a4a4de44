"""The events of a rollout: its phases while it is made, and its result."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mpo.data.levels import Levels
from lightning_mpo.functional.repetition import repeated_share
from lightning_mpo.functional.support_diagnostics import could_not_stop
from lightning_mpo.rewards.scoring import Scores, take_reward_scores
from lightning_mpo.rollout.dynamic import SamplingCounts
from lightning_mpo.rollout.ranks import Total
from lightning_mpo.types import Experience, Finish, Rollout

LEVEL = "level_"
"""Part of the names of metrics by level."""


class Listener:
    """Is called while a rollout is made. By default only `warn` does anything."""

    def phase(self, name: str) -> None:
        """Called when a phase begins: sampling, reward function, scoring, all-reduce."""

    def tokens(self, drawn: int, running: int) -> None:
        """Called after each step of the sampler.

        Args:
            drawn: tokens drawn in this step.
            running: rows that have not ended.
        """

    def sampled(self) -> None:
        """Called after the sampling of a round, before rewards and scoring."""

    def note(self, line: str) -> None:
        """Called with a line for the user."""

    def warn(self, line: str) -> None:
        """Called with a line that the user should act on."""
        warnings.warn(line, stacklevel=2)


@dataclass(frozen=True)
class RolloutEvent:
    """A finished rollout, as other callbacks see it.

    With dynamic sampling its rows, and so `reward/*`, `rollout/length` and `rollout/truncated`, are
    those that the rollout ended with: the groups that were kept, and dropped ones in places that
    stayed free. `counts` is of all that was sampled.
    """

    counter: int
    experience: Experience
    scores: Scores
    sample_seconds: float
    prepare_seconds: float  # rewards, old and reference log-probs
    counts: SamplingCounts | None = None  # of dynamic sampling
    trained: Experience | None = None  # the rows of updates; None: those of `experience`
    levels: Levels | None = None  # of the training rows

    @property
    def tokens(self) -> int:
        """Response tokens of this rank."""
        return int(self.experience.rollout.response_mask_BT.sum())

    @property
    def sampled_tokens(self) -> int:
        """Response tokens that this rank sampled, including groups that were dropped."""
        return self.tokens if self.counts is None else self.counts.tokens

    @property
    def accuracy(self) -> float:
        """Share of right completions among those sampled on this rank and judged for accuracy."""
        if self.counts is None:
            return float(self.scores.correct_B.sum()) / max(float(self.scores.decided_B.sum()), 1.0)
        return self.counts.correct / max(self.counts.decided, 1)

    def sums(self, ends: Sequence[int] = ()) -> dict[str, tuple[float, float]]:
        """Return (sum, count) by metric over this rank's rows, which add up over ranks.

        The first one counts the judged rows.

        Args:
            ends: ids that end a response.
        """
        rollout, scores = self.experience.rollout, self.scores
        # rewards and lengths
        rewards_B, rows = scores.rewards_B.double(), float(len(scores.rewards_B))
        judged = float(scores.judged_B.sum())
        repeats_B = repeated_share(rollout.responses_BT, rollout.response_mask_BT)
        sums = {
            "reward/mean": (rewards_B.sum().item(), judged),
            "reward/judged": (judged, rows),
            "reward/failed": (float(scores.failures_B.sum()), rows),
            "reward/answered": (float(scores.answered_B.sum()), judged),
            "reward/accuracy": (float(scores.correct_B.sum()), float(scores.decided_B.sum())),
            "rollout/length": (float(self.tokens), rows),
            "rollout/truncated": (float(rollout.finish_B.sum()), rows),
            "rollout/repetition": (float(repeats_B.sum()), rows),
            "rollout/groups_flat": _flat_groups(rollout.group_B, scores),
        }
        # responses of a masked policy that end at once
        if rollout.reveal_BT is not None:
            empty_B = (rollout.response_mask_BT.sum(1) == 1) & (rollout.finish_B == Finish.STOP)
            sums["rollout/empty"] = (float(empty_B.sum()), rows)
        # each reward by itself
        for name, values_B in scores.by_reward.items():
            sums[f"reward/{name}"] = (
                values_B.double().nansum().item(),
                float((~values_B.isnan()).sum()),
            )
        return (
            sums
            | _support_sums(rollout, ends)
            | ({} if self.levels is None else _level_sums(self.levels, rollout, scores))
            | ({} if self.counts is None else self.counts.sums())
        )

    def metrics(self, total: Total, ends: Sequence[int] = ()) -> dict[str, float]:
        """Return the metrics of a rollout over all ranks, by name.

        A level that no rank had in this rollout has no metrics.

        Args:
            total: sums over ranks.
            ends: ids that end a response.
        """
        sums = self.sums(ends)
        totals = total(torch.tensor(list(sums.values()), dtype=torch.float64))
        means = {
            name: value / max(count, 1.0)
            for name, (value, count) in zip(sums, totals.tolist(), strict=True)
            if count or LEVEL not in name
        }
        # deviations from the mean of all ranks: differences of squares lose precision
        judged, rewards_B = self.scores.judged_B, self.scores.rewards_B.double()
        squares = total((rewards_B[judged] - means["reward/mean"]).square().sum().cpu())
        rows = totals[0, 1].item()
        means["reward/std"] = (squares.item() / max(rows - 1, 1.0)) ** 0.5
        return means | {"rollout/counter": float(self.counter)}


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


def _level_sums(levels: Levels, rollout: Rollout, scores: Scores) -> dict[str, tuple[float, float]]:
    """Return sums of reward, right answers and flat groups by level, of each level of the data."""
    level_B = torch.tensor([row.extra[levels.column] for row in rollout.rows])
    group_B = rollout.group_B.cpu()
    sums: dict[str, tuple[float, float]] = {}
    for level in levels.values:
        index_B = (level_B == level).nonzero()[:, 0]
        part = take_reward_scores(scores, index_B)
        judged, decided = float(part.judged_B.sum()), float(part.decided_B.sum())
        sums |= {
            f"reward/level_{level}": (part.rewards_B.double().sum().item(), judged),
            f"reward/accuracy_level_{level}": (float(part.correct_B.sum()), decided),
            f"rollout/groups_flat_level_{level}": _flat_groups(group_B[index_B], part),
        }
    return sums


def _support_sums(rollout: Rollout, ends: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Return sums over stored supports: mass, sampled tokens inside, responses without an end."""
    mask_BT, sums = rollout.response_mask_BT, {}
    tokens = float(mask_BT.sum())
    if rollout.kept_mass_BT is not None:
        sums["support/kept_mass"] = (rollout.kept_mass_BT[mask_BT].double().sum().item(), tokens)
    if rollout.support_BTK is not None:
        missing = 0.0 if rollout.outside_BT is None else float(rollout.outside_BT.sum())
        sums["support/hit_rate"] = (tokens - missing, tokens)
        slots_BTK = rollout.support_mask_BTK
        barred_B = could_not_stop(
            rollout.support_BTK,
            slots_BTK,
            mask_BT,
            rollout.finish_B == Finish.STOP,
            ends,
        )
        if slots_BTK is not None:  # without an id: the whole vocabulary, which has end tokens
            barred_B = barred_B & ~(mask_BT & ~slots_BTK.any(-1)).any(-1)
        sums["support/could_not_stop"] = (float(barred_B.sum()), float(len(barred_B)))
    return sums
