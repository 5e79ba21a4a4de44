"""The interface of rewards, and the words for their judgements.

Several rewards form one judgement, the same in training, validation and prediction:

* A reward gives each completion a finite number, or None: it abstains.
* **failed**: a reward raised, crashed, took too long or gave no finite number, also on this row
  alone. The row gets a stated value, by default None, and is not answered.
* **judged**: at least one reward gave a number. A row that no reward judged is not `valid`: it
  carries no loss, is in no denominator, and counts as neither right nor wrong.
* **reward**: the sum of weight × number over the rewards that judged the row.
* **decided**: at least one accuracy reward (`is_accuracy`) judged the row. pass@k,
  `reward/accuracy` and dynamic sampling look at decided rows alone.
* **right** (`correct`): decided, and every accuracy reward that judged the row gave more than 0.5.
* **answered**: judged, and every reward that judged the row found an answer in it.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from lightning_mpo.checks import finite
from lightning_mpo.errors import UserError


class RewardError(UserError):
    """A reward raised, ended its process, took too long, or returned a wrong number of values."""


@dataclass(frozen=True)
class Completion:
    """One response, as a reward sees it.

    Args:
        prompt: text of the prompt, as the data set has it.
        text: the response, without tokens that begin, end or pad it; other special tokens stay.
        target: the right answer.
        tokens: length of the response, with its end token.
        finished: False where `max_new_tokens` cut the response off.
        row: all columns of the data set under their own names, as the file has them. A column that
            is called `target` or `solution`, and is that, is text.
        thinking: the rendered prompt ends inside thoughts: it opened `<think>` and did not close
            it.
        token_ids: the response as sampled, with its end token where it has one.
        solution: a worked solution of the data set, if it has one.
        messages: the chat that the response continues; empty: `prompt` is the message of the user.
    """

    prompt: str
    text: str
    target: str
    tokens: int
    finished: bool
    row: Mapping[str, Any]
    thinking: bool = False
    token_ids: tuple[int, ...] = ()
    solution: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages before the response, which are one of the user if the data has texts."""
        return [dict(message) for message in self.messages] or [
            {"role": "user", "content": self.prompt}
        ]


class Reward(ABC):
    """A judgement of completions: one number each, or None where there is nothing to judge.

    Args:
        weight: factor of this reward in the sum.

    Raises:
        UserError: the weight is not a number, or beyond 1e9.
    """

    is_accuracy: bool = False
    """Whether a score over 0.5 means "right", which validation counts as solved."""
    runs_foreign_code: bool = False
    """Whether code of another package reads responses; it then runs in the helper process."""
    weight: float = 1.0
    """Factor of this reward in the sum."""

    def __init__(self, weight: float = 1.0) -> None:
        finite(type(self).__name__, weight=weight)
        self.weight = weight

    @property
    def name(self) -> str:
        """The name in logs: the class name in snake case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def title(self) -> str:
        """The name in messages."""
        return type(self).__name__

    @abstractmethod
    def score(self, completions: Sequence[Completion]) -> Sequence[float | RewardError | None]:
        """Return one number per completion, in their order.

        None: not judged. A `RewardError` in place of a number: the reward failed on this one.
        """

    def check(self, max_new_tokens: int) -> None:
        """Refuse options that have no meaning with responses of this length.

        Called before a model is loaded.

        Args:
            max_new_tokens: longest response.

        Raises:
            UserError: an option has no meaning.
        """

    def check_columns(self, columns: Sequence[str]) -> None:
        """Refuse data without a column that this reward needs. Called before a model is loaded.

        Args:
            columns: names of the columns of the data.

        Raises:
            UserError: a column is missing.
        """

    def answered(self, completions: Sequence[Completion]) -> Sequence[bool]:
        """Return for each completion whether it has an answer.

        A score of 0 alone may mean "wrong" or "no answer".
        """
        return [True] * len(completions)

    def answers(self, completions: Sequence[Completion]) -> Sequence[str | None] | None:
        """Return the answer of each completion as text, for the vote of a majority (maj@k).

        None in place of a text: it has no answer. None alone: this reward reads no answers.
        Evaluations ask accuracy rewards of this package; equal answers must have equal texts.
        """
        return None


class TokenReward(Reward):
    """A reward that gives each token a number: the reward of that token.

    The sum of the numbers is the score of the response in metrics, and in advantages that compare a
    group. `ReturnToGo` and `GeneralizedAdvantage` use the number of each token: the return of a
    token sums the numbers from this token on. The end token has a number too; a response that was
    cut off has no end token. A response without tokens has an empty list, and the sum 0.

    Args:
        weight: factor of this reward in the sum.

    Raises:
        UserError: the weight is not a number, or beyond 1e9.

    Example:
        >>> class Sevens(TokenReward):
        ...     def token_scores(self, completions):
        ...         return [[float(token == 7) for token in c.token_ids] for c in completions]
        >>> done = Completion("p", "t", "x", 3, True, {}, token_ids=(7, 3, 7))
        >>> Sevens().token_scores([done]), Sevens().score([done])
        ([[1.0, 0.0, 1.0]], [2.0])
    """

    @abstractmethod
    def token_scores(self, completions: Sequence[Completion]) -> Sequence[Sequence[float] | None]:
        """Return for each completion one number per id of `token_ids`; None: not judged.

        Args:
            completions: the responses.
        """

    @final
    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """Return the sum of each completion's numbers; exact sums do not depend on their order."""
        return [
            None if values is None else math.fsum(values)
            for values in self.token_scores(completions)
        ]


class Judgement(NamedTuple):
    """The judgement of one reward on a batch."""

    scores: list[float | None]
    answered: list[bool]
    token_scores: list[list[float] | None] | None = None  # None: the reward is no `TokenReward`
    errors: list[str | None] | None = None  # of failed completions; None: none failed
