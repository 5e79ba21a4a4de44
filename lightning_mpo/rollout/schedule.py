"""The batch arithmetic of a rollout: prompts, updates, micro-batches, and their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mpo.checks import LARGEST_SIZE, at_least
from lightning_mpo.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """How one rollout is spent. One micro-batch is one slot of Lightning's loop.

    Args:
        prompts: prompts of a rollout, over all ranks.
        completions: G.
        minibatches: updates in one pass over the rollout.
        epochs: passes over the rollout.
        micro_batches: micro-batches of an update (`trainer.accumulate_grad_batches`).
        world_size: ranks.
        copies: rows of a response in a pass, each with noise of its own; each pass then has other
            rows. None: rows hold no noise, and all passes have the same rows.
        whole_groups: keep the completions of a prompt in one micro-batch.
    """

    prompts: int
    completions: int
    minibatches: int = 1
    epochs: int = 1
    micro_batches: int = 1
    world_size: int = 1
    copies: int | None = None
    whole_groups: bool = False

    def __post_init__(self) -> None:
        # whole numbers within bounds
        sizes = {
            name: getattr(self, name)
            for name in ("prompts", "completions", "minibatches", "epochs")
        }
        at_least("rollout", 1, **sizes)
        at_least("trainer", 1, accumulate_grad_batches=self.micro_batches)
        at_least("Schedule", 1, copies=self.copies)
        rows = self.prompts * self.completions * self.epochs * (self.copies or 1)
        if rows > LARGEST_SIZE:
            copies = "" if self.copies is None else " x noised copies of the likelihood"
            raise UserError(
                f"`rollout.prompts` x `completions` x `epochs`{copies} is {rows:,} sequences for "
                f"one rollout; at most {LARGEST_SIZE:,} are taken"
            )
        # prompts over processes, rows over updates and micro-batches
        if self.prompts % self.world_size:
            raise UserError(
                f"`rollout.prompts` ({self.prompts}) must be a multiple of the {self.world_size} "
                "processes that share them"
            )
        if self.sequences % self.minibatches:
            raise UserError(
                f"`rollout.minibatches` ({self.minibatches}) must divide the {self.sequences} "
                f"sequences of a rollout on each process ({self.local_prompts} prompts x "
                f"{self.completions} completions)"
            )
        if self.rows // self.minibatches < self.micro_batches:
            raise UserError(
                f"an update has {self.rows // self.minibatches} "
                f"{'sequences' if self.copies is None else 'noised rows'}, which cannot be cut "
                f"into `trainer.accumulate_grad_batches` = {self.micro_batches} micro-batches"
            )
        if self.whole_groups:
            self._check_groups()

    def _check_groups(self) -> None:
        """Refuse updates and micro-batches that would cut the completions of a prompt apart."""
        why = "and the loss compares the completions of a prompt"
        if self.local_prompts % self.minibatches:
            raise UserError(
                f"`rollout.minibatches` ({self.minibatches}) must divide the {self.local_prompts} "
                f"prompts of a rollout on each process, {why}"
            )
        prompts = self.local_prompts // self.minibatches
        if prompts < self.micro_batches:
            raise UserError(
                f"`trainer.accumulate_grad_batches` ({self.micro_batches}) must be at most the "
                f"{prompts} prompts of an update, {why}"
            )

    @property
    def local_prompts(self) -> int:
        """P: prompts of a rollout on one rank."""
        return self.prompts // self.world_size

    @property
    def sequences(self) -> int:
        """B: sequences of a rollout on one rank."""
        return self.local_prompts * self.completions

    @property
    def rows(self) -> int:
        """Rows of one pass over a rollout on one rank: each sequence in its copies."""
        return self.sequences * (self.copies or 1)

    @property
    def updates(self) -> int:
        """Optimiser steps per rollout."""
        return self.minibatches * self.epochs

    @property
    def slots(self) -> int:
        """Micro-batches per rollout."""
        return self.updates * self.micro_batches

    def describe(self, in_row: int = 1) -> str:
        """Return the arithmetic in words.

        Args:
            in_row: noised copies that a row holds.

        Example:
            >>> Schedule(8, 4, minibatches=2).describe()
            '8 prompts x 4 completions = 32 sequences a rollout, 2 updates of 16'
        """
        total = self.prompts * self.completions
        text = f"{self.prompts} prompts x {self.completions} completions = {total} sequences "
        text += "a rollout, "
        text += describe_copies(self.copies or 1, in_row)
        text += f"{self.updates} update{'s' * (self.updates > 1)} of {total // self.minibatches}"
        if self.epochs > 1:
            text += f" in {self.epochs} passes"
        if self.micro_batches > 1:
            text += f", each in {self.micro_batches} micro-batches"
        if self.world_size > 1:
            text += f", spread over {self.world_size} processes"
        return text

    def plan(
        self, group_B: Tensor, tokens_B: Tensor, generator: torch.Generator
    ) -> list[list[Tensor]]:
        """Deal the rows out: `plan[update][micro_batch]` holds row numbers.

        Whole groups are shuffled, then the rows are cut into mini-batches, so that rows of a prompt
        stay together and share its forward pass. Within an update rows are sorted by length, group
        by group, and cut into micro-batches of about equal token sums.

        Args:
            group_B: group numbers of one pass, a group's rows side by side.
            tokens_B: tokens of each row.
            generator: of the shuffle.
        """
        updates = []
        for epoch in range(self.epochs):
            order = torch.randperm(int(group_B.max()) + 1, generator=generator)
            rank_B = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))[
                group_B.cpu()
            ]
            rows_B = rank_B.argsort(stable=True)
            first = 0 if self.copies is None else epoch * len(group_B)
            updates += [
                [
                    first + micro
                    for micro in self._micro_batches(rows, group_B.cpu(), tokens_B.cpu())
                ]
                for rows in rows_B.chunk(self.minibatches)
            ]
        return updates

    def _micro_batches(self, rows: Tensor, group_B: Tensor, tokens_B: Tensor) -> list[Tensor]:
        group, tokens = group_B[rows], tokens_B[rows]
        longest = torch.zeros(int(group_B.max()) + 1, dtype=tokens.dtype).scatter_reduce(
            0, group, tokens, "amax"
        )
        key = (
            longest[group] * (len(longest) + 1) + group
        )  # groups by their longest row, rows of a group together
        rows = rows[key.argsort(stable=True, descending=True)]
        if not self.whole_groups:
            return balanced_cuts(rows, tokens_B[rows], self.micro_batches)
        rows_PG = rows.view(-1, self.completions)
        sums_P = tokens_B[rows_PG].sum(1)
        pieces = balanced_cuts(torch.arange(len(rows_PG)), sums_P, self.micro_batches)
        return [rows_PG[piece].flatten() for piece in pieces]


def describe_copies(rows: int, in_row: int) -> str:
    """Return the noised copies of a sequence in words; empty: it has one.

    Args:
        rows: of a sequence in one pass over a rollout.
        in_row: copies that a row holds.

    Example:
        >>> describe_copies(8, 1), describe_copies(1, 4)
        ('each in 8 noised copies, ', 'each in 4 noised copies in one row, ')
    """
    if rows * in_row == 1:
        return ""
    place = "" if in_row == 1 else f" in {rows} rows" if rows > 1 else " in one row"
    return f"each in {rows * in_row} noised copies{place}, "


def balanced_cuts(rows: Tensor, tokens: Tensor, parts: int) -> list[Tensor]:
    """Cut `rows` into `parts` non-empty pieces of about equal token sums, in their order.

    Example:
        >>> balanced_cuts(torch.arange(4), torch.tensor([6, 2, 2, 2]), 2)
        [tensor([0]), tensor([1, 2, 3])]
    """
    pieces, start, sums = [], 0, torch.cat([torch.zeros(1), tokens.double().cumsum(0)])
    for part in range(parts - 1):
        goal = sums[start] + (sums[-1] - sums[start]) / (parts - part)
        stop = int((sums - goal).abs().argmin())
        stop = min(max(stop, start + 1), len(rows) - (parts - part - 1))
        pieces.append(rows[start:stop])
        start = stop
    return [*pieces, rows[start:]]
