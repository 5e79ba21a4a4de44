"""Flags what a reward should not do, from its judgements on answers of known kinds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from lightning_mpo.rewards.answers import EMPTY, FORM, GOLD, SOLUTION
from lightning_mpo.rewards.trying import Outcome

SUM = "sum"
"""Name of the weighted sum of all rewards."""
TOLERANCE = 1e-6
"""Largest difference of two means, relative to the larger one, that is rounding."""
SHOWN = 80
"""Characters of an answer in a line."""


class Flag(NamedTuple):
    """A finding: the fault, and the place with an example."""

    fault: str
    text: str
    kind: str = ""


def flags(outcomes: Sequence[Outcome], share: float) -> list[Flag]:
    """Return all findings.

    Args:
        outcomes: of each kind; the kind `GOLD` is needed to compare others with it.
        share: largest part of the reward of right answers that others may get.
    """
    lines = [*failures(outcomes), *constants(outcomes)]
    is_constant = any(flag.kind == SUM for flag in lines)
    # verdicts
    gold = next((outcome for outcome in outcomes if outcome.kind is GOLD), None)
    lines += [] if gold is None else judged_wrong(gold)
    if is_constant:  # all other flags would follow from this one
        return lines
    if not any(flag.kind == GOLD.name for flag in lines):
        lines += solutions_judged_wrong(outcomes)
    for outcome in outcomes:
        lines += judged_right(outcome)
    if gold is None:
        return lines
    # comparisons of means; a kind has one flag at most
    lines += above_gold(outcomes, gold, {flag.kind for flag in lines})
    lines += paid_without_being_right(outcomes, gold, share, {flag.kind for flag in lines})
    return lines


def failures(outcomes: Sequence[Outcome]) -> list[Flag]:
    """Return a flag for each reward that raised, and for each that took too long."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for outcome in outcomes:
        for name, part in outcome.parts.items():
            for message in filter(None, part.errors):
                fault = "time-out" if " took more than " in message else "exception"
                groups.setdefault((fault, name), []).append((outcome.kind.name, message))
    return [
        Flag(
            fault,
            f"{messages[0][1].partition(', the limit of ')[0]}; {len(messages)} answers of: "
            f"{', '.join(dict.fromkeys(kind for kind, _ in messages))}",
        )
        for (fault, _), messages in groups.items()
    ]


def constants(outcomes: Sequence[Outcome]) -> list[Flag]:
    """Return a flag for each reward with one number for all answers, and for a constant sum."""
    lines = []
    names = [*dict.fromkeys(name for outcome in outcomes for name in outcome.parts), SUM]
    for name in names:
        scores = [score for outcome in outcomes for score in scores_of(outcome, name)]
        numbers = [score for score in scores if score is not None]
        if len(numbers) > 1 and min(numbers) == max(numbers) and (name != SUM or len(names) > 2):
            text = f"`{name}` gives {numbers[0]:g} to all {len(numbers)} answers that it judged"
            lines.append(Flag("constant", text, SUM if name == SUM or len(names) == 2 else ""))
    return lines


def scores_of(outcome: Outcome, name: str) -> list[float | None]:
    """Return the numbers of a reward, or of the weighted sum."""
    return outcome.sums if name == SUM else outcome.parts[name].scores


def judged_wrong(outcome: Outcome) -> list[Flag]:
    """Return a flag if right answers were judged wrong, or not at all."""
    wrong = [i for i, right in enumerate(outcome.right) if right is False]
    silent = [
        i
        for i, value in enumerate(outcome.sums)
        if value is None and not any(part.errors[i] for part in outcome.parts.values())
    ]
    name, lines = outcome.kind.name, []
    for fault, places in ((f"{name} judged wrong", wrong), (f"{name} not judged", silent)):
        if places:
            lines.append(Flag(fault, _counted(outcome, places), name))
    return lines


def solutions_judged_wrong(outcomes: Sequence[Outcome]) -> list[Flag]:
    """Return a flag if some solutions were judged right and others wrong.

    If all were judged wrong, the rewards read another form.
    """
    for outcome in outcomes:
        if outcome.kind.name == FORM + SOLUTION and True in outcome.right:
            return judged_wrong(outcome)
    return []


def judged_right(outcome: Outcome) -> list[Flag]:
    """Return a flag if answers that are not right were judged right."""
    right = [i for i, judged in enumerate(outcome.right) if judged]
    name = outcome.kind.name
    if outcome.kind.right is not False or not right:
        return []
    return [Flag(f"{name}, judged right", _counted(outcome, right), name)]


def above_gold(outcomes: Sequence[Outcome], gold: Outcome, flagged: set[str]) -> list[Flag]:
    """Return a flag for each kind with more reward than right answers to the same rows."""
    lines = []
    for outcome in outcomes:
        name, means = outcome.kind.name, _means(outcome, gold)
        if name.startswith(FORM) or name in flagged or means is None:
            continue
        mean, right = means
        if mean - right > TOLERANCE * max(abs(mean), abs(right)):
            text = f"{mean:.4g} on average, and gold {right:.4g}"
            lines.append(Flag(f"{outcome.kind.name}, above gold", text, outcome.kind.name))
    return lines


def paid_without_being_right(
    outcomes: Sequence[Outcome], gold: Outcome, share: float, flagged: set[str]
) -> list[Flag]:
    """Return a flag for each kind that is not right and gets a large part of the reward of gold.

    Rewards are counted from that of an empty answer.
    """
    empty = next((outcome for outcome in outcomes if outcome.kind is EMPTY), None)
    means = None if empty is None else _means(empty, gold)
    floor = 0.0 if means is None else means[0]
    if means is not None and means[1] <= floor and EMPTY.name not in flagged:
        text = f"{means[1]:.4g} on average, and an empty answer {floor:.4g}"
        return [Flag("gold, no better than empty", text, EMPTY.name)]
    lines = []
    for outcome in outcomes:
        means = _means(outcome, gold)
        if outcome.kind.right is not False or outcome.kind.name in flagged or means is None:
            continue
        mean, right = means
        if right > floor and mean - floor > share * (right - floor):
            text = (
                f"{(mean - floor) / (right - floor):.0%} of the reward of gold ({mean:.4g} and "
                f"{right:.4g} on average; empty {floor:.4g})"
            )
            lines.append(Flag(f"{outcome.kind.name}, paid like gold", text, outcome.kind.name))
    return lines


def _means(outcome: Outcome, gold: Outcome) -> tuple[float, float] | None:
    """Return the mean sum of a kind and of gold, over rows where both were judged."""
    sums, right = outcome.by_row, gold.by_row
    rows = [row for row in sums if row in right]
    return (fmean(sums[row] for row in rows), fmean(right[row] for row in rows)) if rows else None


def _counted(outcome: Outcome, places: Sequence[int]) -> str:
    """Return the number of answers, and the first as an example."""
    row, completion = list(outcome.answers.items())[places[0]]
    text = repr(completion.text[: SHOWN + 1])
    text = text if len(completion.text) <= SHOWN else f"{completion.text[:SHOWN]!r} …"
    target = completion.target[:SHOWN]
    return f"{len(places)} of {len(outcome.answers)}; row {row + 1}, target {target!r}: {text}"
