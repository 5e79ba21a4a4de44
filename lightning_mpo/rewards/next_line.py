"""Rewards of thoughts in front of a line of code: how much more probable they make the line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.checks import at_least, not_below, within
from lightning_mpo.errors import UserError
from lightning_mpo.functional.thoughts import line_likelihoods, thought_rewards
from lightning_mpo.rewards.base import Completion, Reward
from lightning_mpo.rewards.reference import ReferenceReward

MARK = "#"
"""Beginning of a thought, which is a comment."""
COLUMNS = ("line", "indentation")
"""Columns of the data `CodeLines`."""


class NextLineLikelihood(ReferenceReward):
    """The log-likelihood of the next line of code, less a cost if the response is a thought.

        r = L(a | s, z) - c·1[z is a thought]     [S] (docs/ra3.md)

    L is taken under the frozen reference, on token ids: those before the line, those of the thought
    as sampled, and those of the line. Tokens of its indentation are given and not counted, as a
    thought stands at the column of the line and would give it away [I].

    An empty response is an act without a thought. A thought is a comment line that ends within its
    length. One that copies the line, ends too late or is no comment is not used: its response earns
    the log-likelihood without a thought, less the cost and `penalty`. The data must be `CodeLines`.

    Args:
        cost: c, nats per token of the line; with `total` nats.
        total: sum the log-likelihood over the line's tokens instead of their mean.
        overlap: a thought with this share of the line's runs of words or more is a copy.
        run: words of a run.
        penalty: subtracted for a thought that is not used.
        relative: subtract L(a | s) from each reward, so that an act has 0 and a thought its gain.
            Advantages relative to the mean of a group stay the same.
        weight: factor of this reward in the sum.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        cost: float = 0.05,
        total: bool = False,
        overlap: float = 0.5,
        run: int = 3,
        penalty: float = 0.0,
        relative: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        not_below("NextLineLikelihood", 0, cost=cost, penalty=penalty)
        within("NextLineLikelihood", "(0, 1]", overlap=overlap)
        at_least("NextLineLikelihood", 1, run=run)
        self.cost, self.total, self.penalty = cost, total, penalty
        self.overlap, self.run, self.relative = overlap, run, relative

    def check_columns(self, columns: Sequence[str]) -> None:
        _check_columns(self, columns)

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        rows = [completion.row for completion in completions]
        thoughts = [self._usable(completion) for completion in completions]
        # each context once: equal responses to a prompt have equal rewards
        acts = [
            (tuple(row["before_ids"]), tuple(row["blank_ids"]), tuple(row["line_ids"]))
            for row in rows
        ]
        behind = [
            act if ids is None else (act[0], (*row["indent_ids"], *ids, *act[1]), act[2])
            for act, ids, row in zip(acts, thoughts, rows, strict=True)
        ]
        # those of one prompt stand next to each other
        likelihood = self._likelihoods(sorted({*acts, *behind}))
        # rewards
        rewards_B = thought_rewards(
            torch.tensor([likelihood[parts] for parts in behind], dtype=torch.float64),
            torch.tensor([likelihood[parts] for parts in acts], dtype=torch.float64),
            torch.tensor([is_thought(completion) for completion in completions]),
            torch.tensor([ids is not None for ids in thoughts]),
            cost=self.cost,
            penalty=self.penalty,
            relative=self.relative,
        )
        return list(rewards_B.tolist())

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        """An act, or a thought that can be used."""
        return [
            not is_thought(completion) or self._usable(completion) is not None
            for completion in completions
        ]

    def _usable(self, completion: Completion) -> tuple[int, ...] | None:
        """Return the ids of a thought that can be used; None: an act, or no such thought."""
        if not is_comment(completion):
            return None
        line = str(completion.row["line"])
        copied = copied_share(completion.text, line, self.run)
        return None if copied >= self.overlap else completion.token_ids

    def thought_of(self, completion: Completion) -> str | None:
        """Return the comment of a thought that can be used, without its line end; else None."""
        if self._usable(completion) is None:
            return None
        return completion.text.partition("\n")[0].rstrip()

    def _likelihoods(self, parts: Sequence[Any]) -> dict[Any, float]:
        """Return the log-likelihood of each line behind a prompt and the tokens between."""
        logprobs_BT, mask_BT = self.connected().continuations(*zip(*parts, strict=True))
        values_B: Tensor = line_likelihoods(logprobs_BT, mask_BT, total=self.total)
        return dict(zip(parts, values_B.tolist(), strict=True))


class Thinks(Reward):
    """1 if the response is a thought, 0 if it is an act; its weight is 0, so it is only measured.

    Args:
        weight: factor of this reward in the sum.
    """

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__(weight)

    def check_columns(self, columns: Sequence[str]) -> None:
        _check_columns(self, columns)

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [float(is_thought(completion)) for completion in completions]


class UsableThought(NextLineLikelihood):
    """1 for a thought that `NextLineLikelihood` uses, 0 for another, none for an act; weight 0.

    Args:
        overlap: as for `NextLineLikelihood`.
        run: as for `NextLineLikelihood`.
        weight: factor of this reward in the sum.
    """

    def __init__(self, overlap: float = 0.5, run: int = 3, weight: float = 0.0) -> None:
        super().__init__(overlap=overlap, run=run, weight=weight)

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [
            float(self._usable(completion) is not None) if is_thought(completion) else None
            for completion in completions
        ]


def is_thought(completion: Completion) -> bool:
    """Return whether a response is more than white space; white space is an act."""
    return bool(completion.text.strip())


def is_comment(completion: Completion) -> bool:
    r"""Return whether a response is one whole comment line, which ends with a line break.

    Blank lines may follow, as some tokens hold several line breaks.
    """
    body, newline, rest = completion.text.partition("\n")
    whole = completion.finished and bool(newline) and not rest.strip("\n")
    return whole and body.startswith(MARK) and bool(body.strip(f"{MARK} "))


def copied_share(thought: str, line: str, run: int) -> float:
    """Return the share of a line's runs of words that a thought contains.

    Words are names, numbers and other characters. A line of fewer words is one run.

    Args:
        thought: text of the thought.
        line: text of the line.
        run: words of a run.

    Example:
        >>> copied_share("# x = f(1) then", "    x = f(1)", 3)
        1.0
        >>> copied_share("# call f(1)", "    x = f(1)", 3)
        0.5
    """
    runs = _runs(line, run)
    inside = _runs(thought, min(run, len(_words(line))))
    return len(runs & inside) / max(len(runs), 1)


def _runs(text: str, run: int) -> set[tuple[str, ...]]:
    words = _words(text)
    size = max(1, min(run, len(words)))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _check_columns(reward: Reward, columns: Sequence[str]) -> None:
    """Refuse data that are not lines of code."""
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise UserError(
            f"`{reward.title}` needs the column {missing[0]!r}, which the data `CodeLines` have"
        )
