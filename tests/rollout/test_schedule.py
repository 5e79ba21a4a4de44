"""How a rollout is cut into updates and micro-batches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.rollout.schedule import Schedule, balanced_cuts
from tests.support.builders import seeded

SCHEDULES = [
    Schedule(4, 4),
    Schedule(8, 4, minibatches=2, micro_batches=2),
    Schedule(8, 4, minibatches=4, epochs=3, micro_batches=2),
    Schedule(6, 3, minibatches=3, micro_batches=5),
    Schedule(6, 5, minibatches=5, epochs=2),  # mini-batches cut through groups
    Schedule(3, 2, minibatches=6, micro_batches=1),
    Schedule(8, 2, minibatches=2, micro_batches=3, world_size=2),
]
each = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.describe().replace(" ", "-"))


def lengths(schedule: Schedule, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, 200, (schedule.rows,), generator=seeded(seed))


def groups(schedule: Schedule) -> torch.Tensor:
    return torch.arange(schedule.local_prompts).repeat_interleave(schedule.completions)


def plan(
    schedule: Schedule, seed: int = 0, tokens: torch.Tensor | None = None
) -> list[list[list[int]]]:
    tokens = lengths(schedule) if tokens is None else tokens
    return [
        [m.tolist() for m in update]
        for update in schedule.plan(groups(schedule), tokens, seeded(seed))
    ]


@each
def test_every_row_comes_once_in_each_pass(schedule):
    updates = plan(schedule)
    assert len(updates) == schedule.updates
    for epoch in range(schedule.epochs):
        part = updates[epoch * schedule.minibatches : (epoch + 1) * schedule.minibatches]
        assert sorted(row for update in part for micro in update for row in micro) == list(
            range(schedule.rows)
        )


@each
def test_updates_are_equal_in_rows_and_have_the_same_number_of_filled_micro_batches(schedule):
    for update in plan(schedule):
        assert sum(map(len, update)) == schedule.rows // schedule.minibatches
        assert len(update) == schedule.micro_batches
        assert all(update)
    assert schedule.slots == sum(map(len, plan(schedule)))


@each
def test_groups_stay_together(schedule):
    """An update has whole groups where its size allows, and a micro-batch boundary splits at most one group."""
    G = schedule.completions
    for update in plan(schedule):
        rows = [row for micro in update for row in micro]
        seen = {row // G for row in rows}
        if (schedule.rows // schedule.minibatches) % G == 0:
            assert len(seen) * G == len(rows)
        order = [row // G for row in rows]
        assert len(seen) == 1 + sum(
            a != b for a, b in pairwise(order)
        )  # neighbours, group by group


@each
def test_groups_come_longest_first(schedule):
    tokens = lengths(schedule)
    for update in plan(schedule):
        rows = [row for micro in update for row in micro]
        longest: dict[int, int] = {}
        for row in rows:
            group = row // schedule.completions
            longest[group] = max(longest.get(group, 0), int(tokens[row]))
        assert list(longest.values()) == sorted(longest.values(), reverse=True)


@each
def test_micro_batches_hold_about_equal_token_sums(schedule):
    """None is further from the mean than the longest row of the update."""
    tokens = lengths(schedule)
    for update in plan(schedule):
        sums = [int(tokens[micro].sum()) for micro in update]
        mean = sum(sums) / len(sums)
        longest = max(int(tokens[micro].max()) for micro in update)
        if len(update[0]) > 1 or len(update) == 1:
            assert max(abs(s - mean) for s in sums) <= longest


@each
def test_the_plan_is_a_function_of_the_generator(schedule):
    assert plan(schedule, seed=3) == plan(schedule, seed=3)
    if schedule.minibatches > 1:
        assert any(plan(schedule, seed=3) != plan(schedule, seed=seed) for seed in range(4, 9))


def test_passes_are_shuffled_apart():
    updates = plan(Schedule(16, 2, minibatches=4, epochs=2))
    rows = [sorted(row for micro in update for row in micro) for update in updates]
    assert rows[:4] != rows[4:]


def test_group_numbers_may_have_gaps():
    schedule = Schedule(3, 2, minibatches=3)
    updates = schedule.plan(
        torch.tensor([7, 7, 2, 2, 9, 9]), torch.tensor([5, 6, 7, 8, 9, 1]), seeded(0)
    )
    assert sorted(tuple(sorted(micro.tolist())) for update in updates for micro in update) == [
        (0, 1),
        (2, 3),
        (4, 5),
    ]


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_whole_groups_are_never_cut(micro_batches):
    """With rows of very different lengths, where cuts by tokens alone would go through groups."""
    schedule = Schedule(6, 4, 2, 2, micro_batches=micro_batches, whole_groups=True)
    group_B = torch.arange(6).repeat_interleave(4)
    tokens_B = torch.randint(1, 99, (24,), generator=seeded(3))
    updates = schedule.plan(group_B, tokens_B, seeded(0))
    assert [len(update) for update in updates] == [micro_batches] * 4
    for micro in (micro for update in updates for micro in update):
        assert all((group_B[micro] == group).sum() == 4 for group in group_B[micro].unique())
    rows = torch.cat([micro for update in updates[:2] for micro in update])
    assert rows.sort().values.tolist() == list(range(24))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_cuts_keep_the_order_and_no_piece_is_empty(parts, seed):
    tokens = torch.randint(1, 50, (7,), generator=seeded(seed)).sort(descending=True).values
    rows = torch.randperm(7, generator=seeded(seed))
    pieces = balanced_cuts(rows, tokens, parts)
    assert torch.equal(torch.cat(pieces), rows)
    assert len(pieces) == parts
    assert all(len(piece) for piece in pieces)


def test_cuts_by_hand():
    def cut(tokens, parts):
        return [
            piece.tolist()
            for piece in balanced_cuts(torch.arange(len(tokens)), torch.tensor(tokens), parts)
        ]

    assert cut([1] * 6, 3) == [[0, 1], [2, 3], [4, 5]]
    assert cut([9, 3, 3, 3], 2) == [[0], [1, 2, 3]]
    assert cut([100, 1, 1, 1], 3) == [[0], [1], [2, 3]]
    assert cut([1, 1, 100], 3) == [[0], [1], [2]]
    assert cut([0, 0, 0], 3) == [[0], [1], [2]]


def test_the_arithmetic():
    schedule = Schedule(8, 4, minibatches=2, epochs=3, micro_batches=4, world_size=2)
    assert (schedule.local_prompts, schedule.rows, schedule.updates, schedule.slots) == (
        4,
        16,
        6,
        24,
    )


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Schedule(2, 3), "2 prompts x 3 completions = 6 sequences a rollout, 1 update of 6"),
        (
            Schedule(8, 4, minibatches=2, epochs=3, micro_batches=4, world_size=2),
            "8 prompts x 4 completions = 32 sequences a rollout, 6 updates of 16 in 3 passes, each in 4 micro-batches, "
            "spread over 2 processes",
        ),
    ],
)
def test_describe(schedule, text):
    assert schedule.describe() == text


@pytest.mark.parametrize(
    ("rows", "in_row", "text"),
    [
        (1, 1, ""),
        (8, 1, "each in 8 noised copies, "),
        (1, 4, "each in 4 noised copies in one row, "),
        (2, 3, "each in 6 noised copies in 2 rows, "),
    ],
)
def test_noised_copies_are_named(rows, in_row, text):
    schedule = Schedule(2, 3, copies=rows)
    start = "2 prompts x 3 completions = 6 sequences a rollout, "
    assert schedule.describe(in_row) == f"{start}{text}1 update of 6"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": 0}, "`rollout.prompts` must be at least 1, got 0"),
        ({"completions": 0}, "`rollout.completions` must be at least 1, got 0"),
        ({"minibatches": 0}, "`rollout.minibatches` must be at least 1, got 0"),
        ({"epochs": 0}, "`rollout.epochs` must be at least 1, got 0"),
        (
            {"world_size": 3},
            r"`rollout.prompts` \(4\) must be a multiple of the 3 processes that share them",
        ),
        (
            {"minibatches": 3},
            r"`rollout.minibatches` \(3\) must divide the 8 sequences of a rollout on each process "
            r"\(4 prompts x 2 completions\)",
        ),
        (
            {"minibatches": 4, "micro_batches": 3},
            "an update has 2 sequences, which cannot be cut into `trainer.accumulate_grad_batches` = 3 micro-batches",
        ),
        (
            {"minibatches": 8, "whole_groups": True},
            r"`rollout.minibatches` \(8\) must divide the 4 prompts of a rollout on each process, and the loss "
            "compares the completions of a prompt",
        ),
        (
            {"minibatches": 2, "micro_batches": 3, "whole_groups": True},
            r"`trainer.accumulate_grad_batches` \(3\) must be at most the 2 prompts of an update, and the loss",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_its_numbers(arguments, message):
    with pytest.raises(UserError, match=message):
        Schedule(**{"prompts": 4, "completions": 2} | arguments)
