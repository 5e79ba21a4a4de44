"""Dynamic sampling (DAPO): replaces prompts whose completions are all right or all wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.functional.groups import mixed_groups
from lightning_mpo.rewards.base import Reward
from lightning_mpo.rewards.scoring import Scores, join_reward_scores, take_reward_scores
from lightning_mpo.rollout.joining import join_rollouts
from lightning_mpo.types import Rollout, take_rows, trim_rollout

Judged = tuple[Rollout, Scores]
Draw = Callable[[int, int], Judged]
"""Samples and judges groups; called with the round and the number of prompts."""


@dataclass
class SamplingCounts:
    """Counts over the sampling rounds of one rollout, on this rank.

    Args:
        groups: number of groups that the rollout needs.
    """

    groups: int
    rounds: int = 0
    mixed: int = 0  # groups with right and wrong completions
    right: int = 0  # groups without a wrong one
    wrong: int = 0  # groups with wrong completions and no right one
    undecided: int = 0  # groups that no accuracy reward judged
    rows: int = 0
    decided: int = 0  # rows that an accuracy reward judged
    correct: int = 0
    tokens: int = 0  # sampled tokens
    trained_tokens: int = 0  # tokens of groups that are trained on

    @property
    def missing(self) -> int:
        """Groups that are still missing."""
        return max(self.groups - self.mixed, 0)

    @property
    def next_prompts(self) -> int:
        """Prompts of the next round, at most `groups`.

        Enough to fill the missing groups at the share of mixed groups so far.
        """
        if not self.missing or not self.mixed:
            return self.groups if self.missing else 0
        sampled = self.mixed + self.right + self.wrong + self.undecided
        return min(self.groups, -(-self.missing * sampled // self.mixed))

    def sums(self) -> dict[str, tuple[float, float]]:
        """Return (sum, count) by metric, to be added over ranks; count 0 marks a total."""
        return {
            "rollout/rounds": (float(self.rounds), 1.0),
            "rollout/accuracy_all": (float(self.correct), float(self.decided)),
            "rollout/groups_dropped_right": (float(self.right), 0.0),
            "rollout/groups_dropped_wrong": (float(self.wrong), 0.0),
            "rollout/groups_dropped_undecided": (float(self.undecided), 0.0),
            "rollout/groups_surplus": (float(max(self.mixed - self.groups, 0)), 0.0),
            "rollout/groups_missing": (float(self.missing), 0.0),
            "rollout/tokens_dropped": (float(self.tokens - self.trained_tokens), 0.0),
        }


class DynamicSampling:
    """Fills a rollout with groups in which some completions are right and some are wrong.

    Groups are judged by accuracy only. Their rewards may differ by a penalty on length although all
    completions are right or all are wrong. Such groups are dropped, and further prompts replace
    them. A further round draws as many prompts as fill the missing groups at the share of mixed
    groups so far (verl draws a full batch each time [C]; docs/algorithms.md 4.7). Surplus groups of
    the last round are cut off. If groups are missing after the last round, dropped groups of the
    first round fill the rollout. Their rows carry no loss and stand in no denominator, so every
    rollout has the same number of rows.

    Args:
        rounds: highest number of sampling rounds, with the first one; 10 is verl's
            `max_num_gen_batches` [C].
    """

    def __init__(self, rounds: int = 10) -> None:
        at_least("DynamicSampling", 1, rounds=rounds)
        self.rounds = rounds
        self._warned = False

    def check(self, rewards: Sequence[Reward], completions: int) -> None:
        """Refuse rewards without an accuracy, and groups of one completion."""
        if not any(reward.is_accuracy for reward in rewards):
            names = ", ".join(type(reward).__name__ for reward in rewards)
            raise UserError(
                "`rollout.dynamic` needs a reward that says what is right (`is_accuracy`), got "
                f"{names}: add one such as `ExactAnswer` or `MathAnswer`, or set "
                "`rollout.dynamic: null`"
            )
        if completions < 2:
            raise UserError(
                "`rollout.dynamic` looks for prompts with right and wrong completions; "
                f"`rollout.completions` must be at least 2, got {completions}"
            )

    def collect(
        self,
        draw: Draw,
        groups: int,
        completions: int,
        total: Callable[[Tensor], Tensor] = lambda counts: counts,
        others: Callable[[], AbstractContextManager[None]] = nullcontext,
        warn: Callable[[str], None] = warnings.warn,
    ) -> tuple[Rollout, Scores, SamplingCounts]:
        """Draw until no rank misses a group, or all rounds are used.

        Args:
            draw: samples and judges groups; the rows of a group are adjacent.
            groups: number of groups of the rollout on this rank.
            completions: G.
            total: sums counts over ranks; each rank calls it once a round, so that all stop
                together.
            warn: prints a line for the user.
            others: context that a full rank enters instead of `draw`, because the other ranks may
                need its shard of the weights.

        Returns:
            The rollout, its scores, and the counts. Scores of fillers for missing groups are not
            valid.
        """
        counts = SamplingCounts(groups)
        groups_to_join: list[Judged] = []
        dropped_groups: list[Judged] = []
        for round in range(self.rounds):
            # draw as many groups as this rank needs, and keep the mixed ones
            if counts.next_prompts:
                drawn, needed = draw(round, counts.next_prompts), counts.missing
                mixed_P = self._count(counts, drawn, completions)
                chosen = mixed_P.nonzero()[:needed, 0]
                if len(chosen):
                    groups_to_join.append(_take(drawn, chosen, completions))
                    counts.trained_tokens += int(groups_to_join[-1][0].response_mask_BT.sum())
                if round == 0 and counts.missing:
                    dropped_groups.append(_take(drawn, (~mixed_P).nonzero()[:, 0], completions))
            else:
                with others():
                    pass
            # all ranks stop together
            counts.rounds = round + 1
            rank_counts = [counts.missing, counts.right, counts.wrong, counts.undecided]
            sums = total(torch.tensor(rank_counts, dtype=torch.float64))
            missing, *dropped_counts = sums.tolist()
            if not missing:
                break
        else:
            self._warn_of_missing(warn, int(missing), *map(int, dropped_counts))
        # missing groups become rows without loss
        if counts.missing:
            rollout, scores = _take(dropped_groups[0], torch.arange(counts.missing), completions)
            invalid_scores = replace(scores, valid_B=torch.zeros_like(scores.valid_B))
            groups_to_join.append((rollout, invalid_scores))
        rollout = trim_rollout(join_rollouts([rollout for rollout, _ in groups_to_join]))
        return rollout, join_reward_scores([scores for _, scores in groups_to_join]), counts

    @staticmethod
    def _count(counts: SamplingCounts, drawn: Judged, completions: int) -> Tensor:
        """Add a round to the counts and return a mask of its mixed groups."""
        rollout, scores = drawn
        decided_P = scores.decided_B.view(-1, completions).any(1)
        mixed_P = mixed_groups(scores.correct_B, completions, valid_B=scores.decided_B)
        right_P = scores.correct_B.view(-1, completions).any(1) & ~mixed_P
        counts.mixed += int(mixed_P.sum())
        counts.right += int(right_P.sum())
        counts.wrong += int((decided_P & ~mixed_P & ~right_P).sum())
        counts.undecided += int((~decided_P).sum())
        counts.decided += int(scores.decided_B.sum())
        counts.rows += len(scores.correct_B)
        counts.correct += int(scores.correct_B.sum())
        counts.tokens += int(rollout.response_mask_BT.sum())
        return mixed_P

    def _warn_of_missing(
        self, warn: Callable[[str], None], missing: int, right: int, wrong: int, undecided: int
    ) -> None:
        if self._warned:
            return
        self._warned = True
        unjudged = f", and {undecided} were judged by no accuracy reward" if undecided else ""
        warn(
            f"{missing} groups of a rollout train nothing: in {self.rounds} rounds all "
            f"completions were right for {right} prompts and none for {wrong}{unjudged}; change "
            "the difficulty of `data`, raise `rollout.completions`, or raise `rounds` of "
            "`rollout.dynamic`"
        )


def _take(judged: Judged, groups: Tensor, completions: int) -> Judged:
    rollout, scores = judged
    rows_B = (groups[:, None] * completions + torch.arange(completions)).flatten()
    return take_rows(rollout, rows_B.to(rollout.group_B.device), texts=True), take_reward_scores(
        scores, rows_B
    )
