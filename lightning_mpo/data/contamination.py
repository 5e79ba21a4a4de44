"""Contamination: validation prompts that share a long run of words with training rows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_mpo.types import PromptRow

WORDS = 13
"""Words of a run, as in the check of GPT-3 (arXiv:2005.14165, appendix C) [REC]."""
COMMON = 10
"""A run in more training rows is a common phrase and does not count, as with GPT-3 [REC]."""


def shared_runs(
    train: Sequence[PromptRow],
    validation: Sequence[PromptRow],
    size: int = WORDS,
    common: int = COMMON,
) -> list[tuple[PromptRow, PromptRow]]:
    """Return the validation rows that share a run of words with a training row.

    Case, punctuation and white space do not count. Prompts and solutions of training rows are
    searched. A validation prompt of fewer than `size` words is compared with whole prompts, and
    then signs such as `+` count. The time is linear in the number of words.

    Args:
        train: training rows.
        validation: validation rows.
        size: words of a run.
        common: a run in more training rows than this is ignored.

    Returns:
        Pairs of a validation row and the first training row with one of its runs.

    Example:
        >>> rows = [PromptRow("Add 3 and 4, please.", "7"), PromptRow("add 3 and 5", "8")]
        >>> [row.prompt for row, _ in shared_runs(rows, [PromptRow("Add 3 and 4!", "7")], size=4)]
        ['Add 3 and 4!']
    """
    # runs of validation prompts, with the training rows that have them
    places: dict[tuple[str, ...], list[int]] = {
        run: [] for row in validation for run in runs(_prompt(row), size)
    }
    for number, row in enumerate(train):
        prompt = _prompt(row)
        searched = runs(f"{prompt} {row.solution or ''}", size) | runs(prompt, size)
        for run in searched & places.keys():
            if len(places[run]) <= common:
                places[run].append(number)
    # validation rows with a run that is not common; whole prompts always count
    pairs = []
    for row in validation:
        prompt = _prompt(row)
        limit = common if len(words(prompt)) >= size else common + 1
        numbers = [places[run] for run in runs(prompt, size)]
        first = min((n[0] for n in numbers if 0 < len(n) <= limit), default=None)
        if first is not None:
            pairs.append((row, train[first]))
    return pairs


def runs(text: str, size: int) -> set[tuple[str, ...]]:
    """Return all runs of `size` words of a text; of a shorter text the one run of words and signs.

    Example:
        >>> sorted(runs("One, two THREE", 2)), runs("2 + 3 =", 5)
        ([('one', 'two'), ('two', 'three')], {('2', '+', '3', '=')})
    """
    parts = words(text)
    if len(parts) < size:
        return {tuple(re.findall(r"\w+|[^\w\s.,;:!?'\"]", text.lower()))}
    return {tuple(parts[i : i + size]) for i in range(len(parts) - size + 1)}


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def _prompt(row: PromptRow) -> str:
    """Return the text of a prompt; of a chat that of all its messages."""
    return "\n".join(str(m.get("content") or "") for m in row.messages) or row.prompt
