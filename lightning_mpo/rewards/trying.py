"""Judges answers of known kinds by the rewards of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import NamedTuple

from lightning_mpo.rewards.answers import FORM, PLACE, Kind, Sample, right_answers
from lightning_mpo.rewards.base import Completion, Judgement, Reward, RewardError, TokenReward
from lightning_mpo.rewards.countdown import is_countdown, right_expressions
from lightning_mpo.rewards.program_answers import is_program, right_programs
from lightning_mpo.rewards.scoring import score_all
from lightning_mpo.types import PromptRow

GIVEN = "given"
"""Name of a form of the right answer that the user gives."""


class Part(NamedTuple):
    """One reward on the answers of a kind."""

    scores: list[float | None]
    """A number for each answer; None: not judged."""
    errors: list[str | None]
    """The error of each answer on which the reward failed."""
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """All rewards on the answers of a kind.

    Args:
        kind: the kind.
        answers: an answer to each row, by the number of the row.
        parts: a part for each reward, by name.
        sums: the weighted sum for each answer; None: no reward judged it, or one failed.
        right: for each answer whether it was judged right; None: undecided.
    """

    kind: Kind
    answers: Mapping[int, Completion]
    parts: Mapping[str, Part]
    sums: list[float | None]
    right: list[bool | None]

    @property
    def by_row(self) -> dict[int, float]:
        """The sum of each judged answer, by the number of its row."""
        pairs = zip(self.answers, self.sums, strict=True)
        return {row: value for row, value in pairs if value is not None}


@dataclass
class Trial:
    """Tries the rewards of a run on answers to rows.

    Args:
        rewards: all rewards of the run.
        call: calls one reward.
        encode: returns the tokens of a text; True: with an end token.
    """

    rewards: Sequence[Reward]
    call: Callable[[Reward, Sequence[Completion]], Judgement]
    encode: Callable[[str, bool], tuple[int, ...]]

    def outcome(self, kind: Kind, samples: Sequence[Sample]) -> Outcome | None:
        """Judge the answers of a kind; None: no row has one."""
        answers = dict[int, Completion]()
        for row, sample in enumerate(samples):
            text = kind.write(sample)
            if text is not None and len(answers) != kind.most:
                ids = self.encode(text, kind.finished)
                answers[row] = _completion(sample.row, text, kind.finished, ids)
        return try_kind(kind, answers, self.rewards, self.call) if answers else None

    def forms(self, rows: Sequence[PromptRow], given: str | None = None) -> dict[str, Outcome]:
        """Judge right answers to the rows, by form.

        Args:
            rows: the rows.
            given: a form with `PLACE` for the target, beside the usual ones.
        """
        names = dict.fromkeys(name for row in rows for name in right_forms(row, given))
        samples = [Sample(row) for row in rows]
        kinds = {
            name: Kind(f"{FORM}{name}", None, partial(_in_form, name, given)) for name in names
        }
        outcomes = {name: self.outcome(kind, samples) for name, kind in kinds.items()}
        return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def right_forms(row: PromptRow, given: str | None = None) -> dict[str, str]:
    """Return right answers to a row, by form.

    Args:
        row: the row.
        given: a form with `PLACE` for the target; None: the usual forms alone.
    """
    if is_program(row):
        return right_programs(row)
    if is_countdown(row):
        return right_expressions(row)
    target = row.target.strip()
    first = {GIVEN: given.replace(PLACE, target)} if given is not None and target else {}
    return first | right_answers(row)


def _in_form(name: str, given: str | None, sample: Sample) -> str | None:
    return right_forms(sample.row, given).get(name)


def choose_golds(rows: Sequence[PromptRow], forms: Mapping[str, Outcome]) -> list[str | None]:
    """Return the form in which the right answer to each row is written; None: there is none.

    It is `GIVEN`, else the form that is judged right most often. Among equals it is the one with
    the most reward, then the first.

    Args:
        rows: the rows.
        forms: outcomes by form.
    """

    def rank(name: str) -> tuple[bool, float, float]:
        outcome = forms[name]
        sums = [value for value in outcome.sums if value is not None]
        share = sum(right is True for right in outcome.right) / len(outcome.right)
        return name == GIVEN, share, fmean(sums) if sums else -math.inf

    have = [[name for name in forms if i in forms[name].answers] for i in range(len(rows))]
    return [max(names, key=rank) if names else None for names in have]


def _completion(
    row: PromptRow, text: str, finished: bool, token_ids: tuple[int, ...]
) -> Completion:
    return Completion(
        row.prompt,
        text,
        row.target,
        len(token_ids),
        finished,
        row.extra,
        token_ids=token_ids,
        solution=row.solution,
        messages=row.messages,
    )


def try_kind(
    kind: Kind,
    answers: Mapping[int, Completion],
    rewards: Sequence[Reward],
    call: Callable[[Reward, Sequence[Completion]], Judgement],
) -> Outcome:
    """Judge the answers of a kind; a reward that fails leaves them unjudged.

    Args:
        kind: the kind.
        answers: an answer to each row, by the number of the row.
        rewards: all rewards of a run.
        call: calls one reward.
    """
    completions, judgements, seconds = list(answers.values()), list[Judgement](), list[float]()
    errors: list[list[str | None]] = []
    for reward in rewards:
        begin, failure = time.monotonic(), None
        try:
            judgement = call(reward, completions)
        except RewardError as error:
            failure, judgement = str(error), _not_judged(reward, len(completions))
        judgements.append(judgement)
        errors.append(judgement.errors or [failure] * len(completions))
        seconds.append(time.monotonic() - begin)
    # the sum of a run
    waiting = iter(judgements)
    scores = score_all(rewards, completions, lambda reward, batch: next(waiting))
    failed = [any(messages) for messages in zip(*errors, strict=True)]
    decided, right = scores.decided_B.tolist(), scores.correct_B.tolist()
    return Outcome(
        kind,
        answers,
        {
            name: Part(judgement.scores, messages, duration)
            for name, judgement, messages, duration in zip(
                scores.by_reward, judgements, errors, seconds, strict=True
            )
        },
        [
            value if judged and not fails else None
            for value, judged, fails in zip(
                scores.rewards_B.tolist(), scores.judged_B.tolist(), failed, strict=True
            )
        ],
        [right[i] if decided[i] and not failed[i] else None for i in range(len(completions))],
    )


def _not_judged(reward: Reward, count: int) -> Judgement:
    """Return the judgement of a reward that failed."""
    nothing: list[list[float] | None] | None = (
        [None] * count if isinstance(reward, TokenReward) else None
    )
    return Judgement([None] * count, [False] * count, nothing)
