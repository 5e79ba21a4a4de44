"""Curricula: which training rows a rollout draws, by success, by level or in stages.

`data.curriculum` replaces the passes over all rows. The rows of each rollout are drawn by weights,
without repetition as long as there are enough. They are a function of the seed, the number of the
rollout and the state of the curriculum.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.checks import at_least, positive, within
from lightning_mpo.data.rows import describe
from lightning_mpo.errors import UserError
from lightning_mpo.functional.curriculum import add_counts, learnability
from lightning_mpo.rewards.base import Reward
from lightning_mpo.types import PromptRow


class Curriculum(ABC):
    """Gives each training row a weight, in proportion to which it is drawn."""

    learns: bool = False
    """Whether weights depend on earlier rollouts, which are then passed to `learn`."""

    @abstractmethod
    def weights(self, rows: Sequence[PromptRow], counter: int) -> Tensor:
        """Return the weights of all rows: float64 of at least 0, shape `[N]`.

        Args:
            rows: training rows; each call gets the same ones.
            counter: number of rollouts before this one.

        Raises:
            UserError: a row does not fit.
        """

    def check(self, rewards: Sequence[Reward]) -> None:
        """Refuse rewards from which this curriculum cannot learn.

        Raises:
            UserError: names the reward that is missing.
        """

    def learn(self, rows: Sequence[PromptRow], index_P: Tensor, counts_P2: Tensor) -> None:
        """Take in the results of a rollout.

        Args:
            rows: training rows.
            index_P: row of each prompt, shape `[P]`; a row may be there twice.
            counts_P2: right and judged completions of each prompt over all processes, `[P, 2]`.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint."""


class SuccessRate(Curriculum):
    """Draws rows that are solved half of the time more often than rows that are always or never.

    The weight of a row is 4·p·(1 - p), where p is its success rate so far
    (`functional.curriculum.learnability`). Rows without completions have weight 1.

    Args:
        floor: smallest weight, so that each row is tried again.
        memory: the latest judged completions that a row remembers, approximately.

    Raises:
        UserError: an option is out of range.
    """

    learns = True

    def __init__(self, floor: float = 0.1, memory: float = 32.0) -> None:
        name = type(self).__name__
        within(name, "(0, 1]", floor=floor)
        positive(name, memory=memory)
        self.floor, self.memory = floor, memory
        self._counts_N2: Tensor | None = None

    def check(self, rewards: Sequence[Reward]) -> None:
        if not any(reward.is_accuracy for reward in rewards):
            raise UserError(
                "`data.curriculum: SuccessRate` needs a reward that says what is right "
                "(`is_accuracy`), such as `ExactAnswer` or `MathAnswer`; or set "
                "`data.curriculum: null`"
            )

    def weights(self, rows: Sequence[PromptRow], counter: int) -> Tensor:
        counts_N2 = self._counts(rows)
        return learnability(counts_N2[:, 0], counts_N2[:, 1], self.floor)

    def learn(self, rows: Sequence[PromptRow], index_P: Tensor, counts_P2: Tensor) -> None:
        self._counts_N2 = add_counts(self._counts(rows), index_P, counts_P2, self.memory)

    def _counts(self, rows: Sequence[PromptRow]) -> Tensor:
        """Return right and judged completions of each row, shape `[N, 2]`."""
        if self._counts_N2 is None:
            return torch.zeros(len(rows), 2, dtype=torch.float64)
        if len(self._counts_N2) != len(rows):
            raise UserError(
                f"`data.curriculum` has counts of {len(self._counts_N2)} rows, and there are "
                f"{len(rows)}: take the data that the checkpoint was trained on"
            )
        return self._counts_N2

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts_N2}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        counts_N2 = state["counts"]
        if counts_N2 is not None and (
            not isinstance(counts_N2, Tensor)
            or counts_N2.dtype != torch.float64
            or counts_N2.shape[1:] != (2,)
        ):
            raise TypeError("`counts` of the curriculum must be a float64 tensor [N, 2], or None")
        self._counts_N2 = counts_N2


class EasyToHard(Curriculum):
    """Opens the levels of rows one after the other, at equal intervals; open levels stay open.

    A level is a number, or a text with one, such as "Level 3". A text without a number, such as
    "Level ?", is the highest level. Open rows are drawn with equal probabilities.

    Args:
        rollouts: number of the rollout that opens the last level.
        column: column of the level.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(self, rollouts: int, column: str = "level") -> None:
        at_least(type(self).__name__, 1, rollouts=rollouts)
        self.rollouts, self.column = rollouts, column
        self._rows: Sequence[PromptRow] = ()
        self._steps_N: Tensor | None = None

    def weights(self, rows: Sequence[PromptRow], counter: int) -> Tensor:
        if self._steps_N is None or self._rows is not rows:
            self._rows, self._steps_N = rows, self._steps(rows)
        # step i of L opens at i·rollouts / (L - 1)
        last = max(int(self._steps_N.max()), 1)
        return (self._steps_N * self.rollouts <= counter * last).double()

    def _steps(self, rows: Sequence[PromptRow]) -> Tensor:
        """Return for each row the rank of its level, from 0."""
        texts = level_texts(rows, self.column)
        matches = [re.search(r"-?\d+(\.\d+)?", text) for text in texts]
        numbers = [None if match is None else float(match[0]) for match in matches]
        known = sorted({number for number in numbers if number is not None})
        if not known:
            raise UserError(
                f"`EasyToHard.column`: no level in {self.column!r} has a number, such as "
                f"{texts[0][:60]!r}; `Stages` takes levels of other kinds"
            )
        ranks = {number: rank for rank, number in enumerate(known)}
        return torch.tensor([len(known) - 1 if n is None else ranks[n] for n in numbers])


class Stages(Curriculum):
    """Draws rows of some levels from a rollout on, until the next stage begins.

    Args:
        stages: levels by the number of the first rollout of their stage, such as
            `{0: [1, 2], 50: [3]}`. One stage begins at 0.
        column: column of the level.

    Raises:
        UserError: no stage begins at 0, or a stage has no level.

    Example:
        >>> rows = [PromptRow("a", "b", extra={"level": level}) for level in (1, 2, 3)]
        >>> stages = Stages({0: [1, 2], 50: [3]})
        >>> stages.weights(rows, 49).tolist(), stages.weights(rows, 50).tolist()
        ([1.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    """

    def __init__(self, stages: dict[int, list[int | float | str]], column: str = "level") -> None:
        for start, levels in stages.items():
            at_least(type(self).__name__, 0, stages=start)
            if not levels:
                raise UserError(f"`Stages.stages`: stage {start} must list at least one level")
        if 0 not in stages:
            raise UserError(
                "`Stages.stages` must have a stage that begins at rollout 0, got stages that "
                f"begin at {', '.join(map(str, stages)) or 'none'}"
            )
        self.stages, self.column = dict(sorted(stages.items())), column
        self._rows: Sequence[PromptRow] = ()
        self._weights: dict[int, Tensor] = {}

    def weights(self, rows: Sequence[PromptRow], counter: int) -> Tensor:
        if not self._weights or self._rows is not rows:
            self._rows, self._weights = rows, self._of_stages(rows)
        return self._weights[max(start for start in self.stages if start <= counter)]

    def _of_stages(self, rows: Sequence[PromptRow]) -> dict[int, Tensor]:
        """Return the weights of each stage, and refuse levels that no row has."""
        texts, weights = level_texts(rows, self.column), {}
        for start, levels in self.stages.items():
            chosen = {_text(level) for level in levels}
            missing = sorted(chosen - set(texts))
            if missing:
                present = sorted(set(texts))
                raise UserError(
                    f"`Stages.stages`: no training row has {self.column!r} = {missing[0]!r}; rows "
                    f"have {', '.join(map(repr, present[:10]))}{', …' * (len(present) > 10)}"
                )
            weights[start] = torch.tensor([text in chosen for text in texts], dtype=torch.float64)
        return weights


def check_imitation(curriculum: Curriculum | None, stage: str) -> None:
    """Refuse a curriculum that learns from rewards in a stage that has none.

    Args:
        curriculum: of the data.
        stage: class of the stage, for the message.

    Raises:
        UserError: it learns from rewards.
    """
    if curriculum is not None and curriculum.learns:
        raise UserError(
            f"`data.curriculum: {type(curriculum).__name__}` learns from rewards, and `{stage}` "
            "has none; set `data.curriculum: null` in the configuration of this stage"
        )


def level_texts(rows: Sequence[PromptRow], column: str) -> list[str]:
    """Return the level of each row as text.

    Raises:
        UserError: a row lacks the column.
    """
    for row in rows:
        if row.extra.get(column) is None:
            columns = ", ".join(map(repr, row.extra)) or "none"
            raise UserError(
                f"`data.curriculum` reads levels from the column {column!r}, and {describe(row)} "
                f"has none; its columns are {columns}"
            )
    return [_text(row.extra[column]) for row in rows]


def _text(level: Any) -> str:
    """Return a level as text; 3 and 3.0 are equal."""
    whole = isinstance(level, float) and level.is_integer()
    return str(int(level) if whole else level).strip()
