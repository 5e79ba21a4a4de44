"""Dynamic sampling on its own, over rollouts whose right and wrong completions are made up."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import ExactAnswer, Finished, Scores
from lightning_mpo.rollout import DynamicSampling
from lightning_mpo.types import PromptRow
from tests.support.builders import make_rollout, seeded

G = 3
FULL = 21
"""A seed whose first round has useful groups alone."""


class Source:
    """Makes groups up, a pure function of (seed, round), and writes down what was asked for.

    Args:
        share: of completions that are right, by round; the last one goes on.
        judged: share of completions that are judged at all.
    """

    def __init__(self, *share: float, judged: float = 1.0, seed: int = 0) -> None:
        self.share, self.judged, self.seed = share, judged, seed
        self.asked: list[tuple[int, int]] = []
        self.drawn = []

    def __call__(self, round, prompts):
        self.asked.append((round, prompts))
        g = seeded(1000 * self.seed + round)
        B = prompts * G
        lengths = torch.randint(1, 9, (B,), generator=g).tolist()
        depth = torch.randint(1, 5, (prompts,), generator=g).tolist()
        correct = torch.rand(B, generator=g) < self.share[min(round, len(self.share) - 1)]
        judged = torch.rand(B, generator=g) < self.judged
        names = tuple(f"{round}.{b}" for b in range(B))
        rollout = replace(
            make_rollout(depth, lengths, support=2 + round % 3, seed=round),
            texts=names,
            rows=tuple(PromptRow(name, "") for name in names),
        )
        rewards = torch.rand(
            B, generator=g
        )  # no two alike: a criterion on rewards would keep every group
        scores = Scores(
            rewards, judged, correct & judged, torch.ones_like(correct), {"part": rewards}, judged
        )
        self.drawn.append((rollout, scores))
        return rollout, scores


def expected(source: Source, places: int) -> tuple[list[str], int]:
    """Say by loops over groups and rows which texts a rollout of `places` groups holds, and how many groups miss."""
    kept: list[list[str]] = []
    first_dropped: list[list[str]] = []
    for index, (rollout, scores) in enumerate(source.drawn):
        for start in range(0, len(rollout.texts), G):
            rows = range(start, start + G)
            names = [rollout.texts[b] for b in rows]
            found = {bool(scores.correct_B[b]) for b in rows if scores.valid_B[b]}
            if found == {True, False}:
                if len(kept) < places:
                    kept.append(names)
            elif index == 0:
                first_dropped.append(names)
    missing = places - len(kept)
    return sum(kept + first_dropped[:missing], []), missing


CASES = {
    "none drops": Source(0.5, seed=FULL),
    "some drop": Source(0.2, seed=8),
    "few are useful": Source(0.05, seed=2),
    "useful only later": Source(1.0, 0.0, 0.5, seed=3),
    "all right": Source(1.0),
    "all wrong": Source(0.0),
    "some are not judged": Source(0.4, judged=0.6, seed=4),
}


@pytest.mark.parametrize("places", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_groups_that_are_kept_are_those_of_a_loop(name, places):
    source = CASES[name]
    source.asked, source.drawn = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rollout, scores, account = DynamicSampling(6).collect(source, places, G)
    names, missing = expected(source, places)
    assert list(rollout.texts) == [row.prompt for row in rollout.rows] == names
    assert account.missing == missing
    assert len(names) == len(scores.rewards_B) == len(rollout.group_B) == places * G
    assert rollout.group_B.tolist() == [p for p in range(places) for _ in range(G)]
    by_name = {
        text: (
            drawn.rewards_B[b],
            drawn.correct_B[b],
            drawn.valid_B[b],
            part.responses_BT[b][part.response_mask_BT[b]],
        )
        for part, drawn in source.drawn
        for b, text in enumerate(part.texts)
    }
    for b, text in enumerate(names):
        reward, correct, valid, tokens = by_name[text]
        alive = b < (places - missing) * G
        assert scores.rewards_B[b] == scores.by_reward["part"][b] == reward
        assert scores.correct_B[b] == correct
        assert scores.valid_B[b] == (valid and alive)
        assert torch.equal(rollout.responses_BT[b][rollout.response_mask_BT[b]], tokens)
    assert (missing == places) == (name in ("all right", "all wrong"))


def test_the_cases_show_all_kinds_of_ends():
    seen = set()
    for source in CASES.values():
        source.asked, source.drawn = [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, _, account = DynamicSampling(6).collect(source, 4, G)
        surplus = account.mixed > account.groups
        seen.add((account.rounds == 1, account.missing > 0, surplus))
    assert {(True, False, False), (False, False, True), (False, True, False)} <= seen


def test_a_redraw_takes_what_fills_the_free_places_at_the_share_so_far():
    source = Source(0.2, seed=1)
    DynamicSampling(10).collect(source, 8, G)
    assert source.asked[0] == (0, 8)
    assert [round for round, _ in source.asked] == list(range(len(source.asked)))
    assert len(source.asked) > 2
    useful = seen = 0
    for (_, asked), (_, scores) in zip(source.asked, source.drawn, strict=True):
        if seen:
            assert asked == (min(8, math.ceil((8 - useful) * seen / useful)) if useful else 8)
        seen += asked
        useful += sum(0 < int(group.sum()) < G for group in scores.correct_B.view(-1, G))
    assert useful >= 8


def test_ranks_stop_together_and_count_once_a_round():
    """A rank that is full draws nothing more while the other goes on; both call the all-reduce equally often."""
    fast, slow = Source(0.5, seed=FULL), Source(1.0, 1.0, 0.5, seed=3)
    missing: list[torch.Tensor] = []
    alone = DynamicSampling(9).collect(
        slow, 2, G, lambda counts: (missing.append(counts), counts)[1]
    )[2]
    calls: list[float] = []

    def total(counts):
        calls.append(counts[0].item())
        return counts + missing[len(calls) - 1]

    _, _, account = DynamicSampling(9).collect(fast, 2, G, total)
    assert account.rounds == alone.rounds == len(calls) > 2
    assert calls == [0] * alone.rounds
    assert fast.asked == [(0, 2)]


def test_rounds_bound_the_draws_and_one_sentence_names_cause_and_option():
    source, dynamic = Source(1.0), DynamicSampling(3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            dynamic.collect(source, 4, G)
    assert [round for round, _ in source.asked] == [0, 1, 2] * 2
    (sentence,) = [str(line.message) for line in said]
    assert sentence.startswith(
        "4 groups of a rollout train nothing: in 3 rounds all completions were right for 12 prompts"
    )
    assert "none for 0" in sentence
    assert "`rounds` of `rollout.dynamic`" in sentence
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DynamicSampling(9).collect(Source(0.5, seed=FULL), 4, G)


def test_the_account_adds_up():
    source = Source(0.3, judged=0.9, seed=5)
    rollout, scores, account = DynamicSampling(8).collect(source, 6, G)
    parts = source.drawn
    sums = account.sums()
    tokens = sum(int(part.response_mask_BT.sum()) for part, _ in parts)
    right = wrong = mixed = 0
    for _, drawn in parts:
        for start in range(0, len(drawn.correct_B), G):
            found = {bool(drawn.correct_B[b]) for b in range(start, start + G) if drawn.valid_B[b]}
            mixed, right, wrong = (
                mixed + (len(found) == 2),
                right + (found == {True}),
                wrong + (found == {False}),
            )
    assert account.rounds == len(parts) > 1
    assert (account.mixed, account.right, account.wrong) == (mixed, right, wrong)
    assert min(right, wrong, mixed) > 0
    assert account.missing == 0
    assert sums["rollout/groups_dropped_right"] == (right, 0)
    assert sums["rollout/groups_dropped_wrong"] == (wrong, 0)
    assert sums["rollout/groups_surplus"] == (mixed - 6, 0)
    assert sums["rollout/groups_missing"] == (0, 0)
    assert sums["rollout/tokens_dropped"] == (tokens - int(rollout.response_mask_BT.sum()), 0)
    everything = torch.cat([drawn.correct_B for _, drawn in parts])
    decided = sum(int(drawn.decided_B.sum()) for _, drawn in parts)
    assert sums["rollout/accuracy_all"] == (everything.sum(), decided)
    assert scores.valid_B.float().mean() > 0.5


def test_tokens_of_places_that_stay_free_count_as_dropped():
    source = Source(0.0)
    with pytest.warns(UserWarning, match="2 groups of a rollout train nothing"):
        _, _, account = DynamicSampling(2).collect(source, 2, G)
    tokens = sum(int(part.response_mask_BT.sum()) for part, _ in source.drawn)
    assert account.tokens == tokens
    assert account.sums()["rollout/tokens_dropped"] == (tokens, 0)


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_rounds_are_refused(rounds):
    with pytest.raises(
        UserError, match=f"`DynamicSampling.rounds` must be at least 1, got {rounds}"
    ):
        DynamicSampling(rounds)


def test_rewards_without_accuracy_and_groups_of_one_are_refused():
    dynamic = DynamicSampling()
    assert dynamic.rounds == 10
    dynamic.check([Finished(), ExactAnswer()], 2)
    with pytest.raises(UserError, match="needs a reward that says what is right .*, got Finished"):
        dynamic.check([Finished()], 2)
    with pytest.raises(UserError, match="`rollout.completions` must be at least 2, got 1"):
        dynamic.check([ExactAnswer()], 1)
