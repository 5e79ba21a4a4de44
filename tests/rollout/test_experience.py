"""Rewards of tokens in an experience: placed at their tokens, compared in groups by their sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from lightning_mpo.errors import UserError
from lightning_mpo.modules.rollout_setup import check_token_rewards
from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.objective.advantages import (
    Advantage,
    GeneralizedAdvantage,
    GroupRelative,
    LeaveOneOut,
    PrefixTree,
    ReturnToGo,
)
from lightning_mpo.objective.kl import ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import TokenMean
from lightning_mpo.objective.value_loss import ValueLoss
from lightning_mpo.rewards import Completion, Reward, TokenReward, completions_of, score_all
from lightning_mpo.rollout.experience import build_experience
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.types import Experience, PromptRow
from tests.support.bigram import BigramPolicy
from tests.support.builders import make_rollout, seeded

LENGTHS = [3, 5, 1, 4, 2, 5]
ROLLOUT = replace(
    make_rollout([2, 3], LENGTHS, seed=4),
    texts=tuple("abcdef"),
    rows=tuple(PromptRow(name, "") for name in "aaabbb"),
)
DRAWS = torch.randn(6, 5, generator=seeded(1), dtype=torch.float64)
VALUES = torch.randn(6, 5, generator=seeded(2)) * ROLLOUT.response_mask_BT
OUTCOMES = [1.0, 0.0, 0.25, -1.0, 2.0, 0.5]


class OfTokens(TokenReward):
    """Gives each token a number of a table."""

    def token_scores(self, completions: Sequence[Completion]) -> list[list[float]]:
        return [row[: c.tokens].tolist() for row, c in zip(DRAWS, completions, strict=True)]


class AtTheEnd(TokenReward):
    """Gives the last token the number of the response."""

    def token_scores(self, completions: Sequence[Completion]) -> list[list[float]]:
        return [[0.0] * (c.tokens - 1) + [x] for x, c in zip(OUTCOMES, completions, strict=True)]


class OfResponses(Reward):
    """Gives each response a number."""

    def score(self, completions: Sequence[Completion]) -> list[float]:
        return OUTCOMES


class WithValues(BigramPolicy):
    """A table of bigrams beside a table of values."""

    def score(self, rollout, mask_BT, **options):
        scores = super().score(rollout, mask_BT, **options)
        return replace(scores, values_BT=VALUES[: len(mask_BT)])


def experience_of(rewards: Sequence[Reward], *axes: object) -> Experience:
    """Build the experience of the rollout under an advantage and loss terms."""
    advantage, *terms = axes
    assert isinstance(advantage, Advantage)
    scorer = Scorer(WithValues(), tokens=10**6)
    objective = Objective(advantage=advantage, terms=terms, reduction=TokenMean())
    scores = score_all(rewards, completions_of(ROLLOUT))
    return build_experience(
        scorer,
        objective,
        ROLLOUT,
        scores,
        seeded(0),
        updates=2,
        reference=objective.needs_reference,
    )


def loop(rewards: list[list[float]], gamma: float, lam: float, critic: bool) -> Tensor:
    """Return generalised advantages by their definition: a sum over all later tokens."""
    advantages = torch.zeros(6, 5, dtype=torch.float64)
    for b, row in enumerate(rewards):
        values = [float(v) if critic else 0.0 for v in VALUES[b, : len(row)]] + [0.0]
        deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(row)]
        for t in range(len(row)):
            later = range(t, len(row))
            advantages[b, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in later)
    return advantages


def weighted() -> list[list[float]]:
    """Return 0.5 × the numbers of tokens, and 2 × those of responses at the last token."""
    rows = [[0.5 * float(x) for x in DRAWS[b, :n]] for b, n in enumerate(LENGTHS)]
    for row, outcome in zip(rows, OUTCOMES, strict=True):
        row[-1] += 2.0 * outcome
    return rows


CASES = [
    (GeneralizedAdvantage(0.9, 0.8, whiten=False), [ValueLoss()], (0.9, 0.8, True)),
    (GeneralizedAdvantage(1.0, 1.0, whiten=False), [ValueLoss()], (1.0, 1.0, True)),
    (ReturnToGo(1.0, whiten=False), [], (1.0, 1.0, False)),
    (ReturnToGo(0.7, whiten=False), [], (0.7, 1.0, False)),
]


@pytest.mark.parametrize(("advantage", "terms", "options"), CASES)
def test_advantages_are_those_of_a_loop_over_later_tokens(advantage, terms, options) -> None:
    experience = experience_of([OfTokens(0.5), OfResponses(2.0)], advantage, *terms)
    rewards = weighted()
    expected = loop(rewards, *options)
    torch.testing.assert_close(experience.advantages_BT.double(), expected, atol=1e-5, rtol=1e-5)
    sums = torch.tensor([sum(row) for row in rewards])
    torch.testing.assert_close(experience.rewards_B, sums)


AXES = {
    "gae": (GeneralizedAdvantage(0.9, 0.8), ValueLoss()),
    "returns": (ReturnToGo(0.9),),
    "group": (GroupRelative(),),
    "prefixes": (PrefixTree(),),
    "a penalty": (ReturnToGo(), KLPenalty(ConstantCoefficient(0.3), "k1", "reward")),
}


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("mixed", [False, True])
def test_all_at_the_last_token_is_an_ordinary_reward_bit_for_bit(name, mixed) -> None:
    others = [OfResponses(0.3)] if mixed else []
    first = experience_of([AtTheEnd(0.7), *others], *AXES[name])
    second = experience_of([OfResponses(0.7), *others], *AXES[name])
    for item in fields(Experience):
        one, other = getattr(first, item.name), getattr(second, item.name)
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype, item.name
            assert torch.equal(one, other), item.name
        else:
            assert item.name == "rollout" or one is other is None, item.name


class Shuffled(TokenReward):
    """Gives all responses the same numbers, in another order."""

    def token_scores(self, completions: Sequence[Completion]) -> list[list[float]]:
        g = seeded(5)
        numbers = torch.tensor([0.1, 0.2, 0.3, 0.7, 1.1], dtype=torch.float64)
        return [numbers[torch.randperm(5, generator=g)].tolist() for _ in completions]


@pytest.mark.parametrize("advantage", [GroupRelative(), GroupRelative("none"), LeaveOneOut()])
def test_equal_sums_in_another_order_teach_a_group_nothing(monkeypatch, advantage) -> None:
    even = replace(make_rollout([2, 3], [5] * 6, seed=4), texts=ROLLOUT.texts, rows=ROLLOUT.rows)
    monkeypatch.setattr("tests.rollout.test_experience.ROLLOUT", even)
    experience = experience_of([Shuffled(0.7)], advantage)
    assert not experience.advantages_BT.any()
    assert len(experience.rewards_B.unique()) == 1


@pytest.mark.parametrize(
    ("advantage", "axes", "message"),
    [
        (
            ReturnToGo(),
            {"actions": SequenceActions()},
            "`SequenceActions` takes one advantage for a response, and `ReturnToGo` gives its "
            "tokens different ones by the reward `Mine`; use `SequenceActions.form: token`",
        ),
        (
            PrefixTree(),
            {"reduction": TokenMean()},
            "`PrefixTree` compares rewards of responses, and `Mine` gives each token a number",
        ),
    ],
)
def test_rewards_of_tokens_are_refused_where_they_have_no_meaning(advantage, axes, message) -> None:
    with pytest.raises(UserError, match=message):
        check_token_rewards(Objective(advantage=advantage, **axes), "Mine")
    whole, single = SequenceActions(), SequenceActions(form="token")
    check_token_rewards(Objective(actions=whole, advantage=GroupRelative()), "Mine")
    check_token_rewards(Objective(actions=single, advantage=ReturnToGo()), "Mine")
