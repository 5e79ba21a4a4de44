"""The reward interface, and the one place that calls rewards and checks what they return."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_mpo.checks import finite
from lightning_mpo.errors import UserError
from lightning_mpo.types import Finish, Rollout


class RewardError(UserError):
    """A reward raised, or returned something that is no list of one number per completion."""


@dataclass(frozen=True)
class Completion:
    """What a reward sees of one response."""

    prompt: str
    text: str
    target: str
    tokens: int
    finished: bool
    row: Mapping[str, Any]


class Reward(ABC):
    """A judgement of completions; one number each, or None where there is nothing to judge.

    Rows that any reward judges None carry no advantage and stand in no denominator.

    Args:
        weight: factor of this reward in the sum.
    """

    is_accuracy: ClassVar[bool] = False
    """True where a score over 0.5 means "right": what validation counts as solved."""

    def __init__(self, weight: float = 1.0) -> None:
        finite(type(self).__name__, weight=weight)
        self.weight = weight

    @property
    def name(self) -> str:
        """The name in logs: the class name in snake case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def score(self, completions: Sequence[Completion]) -> Sequence[float | None]:
        """Return one number per completion, in their order; None: not judged."""

    def check(self, max_new_tokens: int) -> None:
        """Refuse what responses of at most so many tokens make meaningless; asked before a model is loaded."""

    def answered(self, completions: Sequence[Completion]) -> Sequence[bool]:
        """Say in which completions there was an answer to judge; a score of 0 alone cannot tell "wrong" from "none"."""
        return [True] * len(completions)


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch."""

    rewards_B: Tensor  # float32, the weighted sum
    valid_B: Tensor  # bool
    correct_B: Tensor  # bool: every accuracy reward says "right"
    answered_B: Tensor  # bool: every reward found an answer to judge
    parts: Mapping[str, Tensor]  # by reward name, unweighted, nan where not judged


def take_reward_scores(scores: Scores, index_B: Tensor) -> Scores:
    """Select rows."""
    return Scores(
        rewards_B=scores.rewards_B[index_B],
        valid_B=scores.valid_B[index_B],
        correct_B=scores.correct_B[index_B],
        answered_B=scores.answered_B[index_B],
        parts={name: values_B[index_B] for name, values_B in scores.parts.items()},
    )


def join_reward_scores(parts: Sequence[Scores]) -> Scores:
    """Put scores of the same rewards below each other.

    Raises:
        ValueError: they are of other rewards.
    """
    names = list(parts[0].parts)
    if any(list(part.parts) != names for part in parts):
        raise ValueError(f"`parts` must be scores of the same rewards, got {[list(part.parts) for part in parts]}")
    return Scores(
        rewards_B=torch.cat([part.rewards_B for part in parts]),
        valid_B=torch.cat([part.valid_B for part in parts]),
        correct_B=torch.cat([part.correct_B for part in parts]),
        answered_B=torch.cat([part.answered_B for part in parts]),
        parts={name: torch.cat([part.parts[name] for part in parts]) for name in names},
    )


def completions_of(rollout: Rollout) -> list[Completion]:
    """Describe each row of a rollout to rewards."""
    tokens = rollout.response_mask_BT.sum(1).tolist()
    finish = rollout.finish_B.tolist()
    return [
        Completion(row.prompt, text, row.target, n, end == Finish.STOP, row.extra)
        for row, text, n, end in zip(rollout.rows, rollout.texts, tokens, finish, strict=True)
    ]


def score_all(rewards: Sequence[Reward], completions: Sequence[Completion]) -> Scores:
    """Call every reward and add the weighted scores up.

    Raises:
        RewardError: a reward raised, returned what is no finite number, or returned a wrong count.
    """
    total = torch.zeros(len(completions))
    valid = torch.ones(len(completions), dtype=torch.bool)
    correct = torch.full_like(valid, any(reward.is_accuracy for reward in rewards))
    answered = torch.ones_like(valid)
    parts: dict[str, Tensor] = {}
    for reward in rewards:
        scores = _scores(reward, completions)
        valid &= ~scores.isnan()
        total += reward.weight * scores.nan_to_num()
        if reward.is_accuracy:
            correct &= scores > 0.5
        answered &= torch.tensor([bool(value) for value in _call(reward, "answered", completions)], dtype=torch.bool)
        parts[_free_name(reward.name, parts)] = scores
    return Scores(total, valid, correct, answered, parts)


def _free_name(name: str, taken: Mapping[str, Tensor]) -> str:
    return next(free for free in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 2))) if free not in taken)


def _scores(reward: Reward, completions: Sequence[Completion]) -> Tensor:
    scores: list[float] = []
    for completion, value in zip(completions, _call(reward, "score", completions), strict=True):
        try:
            score = math.nan if value is None else float(value)
        except (TypeError, ValueError, RuntimeError):
            score = math.inf
        if math.isinf(score) or (math.isnan(score) and value is not None):
            raise RewardError(
                f"reward `{type(reward).__name__}` returned {value!r:.40} for completion {len(scores)} "
                f"({completion.text[:40]!r}); return a finite number, or None where there is nothing to judge"
            )
        scores.append(score)
    return torch.tensor(scores, dtype=torch.float32)


def _call(reward: Reward, method: str, completions: Sequence[Completion]) -> list[Any]:
    """Call `reward.score` or `reward.answered`; whatever comes back is a list of the right length."""
    who = f"reward `{type(reward).__name__}`" + ("" if method == "score" else f", in `{method}`,")
    try:
        raw = getattr(reward, method)(completions)
    except Exception as error:
        raise RewardError(f"{who} raised {type(error).__name__}: {error}") from error
    if isinstance(raw, str) or not isinstance(raw, Sequence | Tensor):
        raise RewardError(f"{who} must return a list of {len(completions)} numbers, got {type(raw).__name__}")
    if len(raw) != len(completions):
        raise RewardError(f"{who} must return one number per completion ({len(completions)}), got {len(raw)}")
    return list(raw)
