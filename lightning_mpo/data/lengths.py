"""Lengths of prompts in tokens, checked before training; few prompts are rendered for it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from lightning_mpo.data.rendering import HUGE, Renderer
from lightning_mpo.data.rows import describe
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Splits

SLACK = 8
"""Tokens per message that a template may add on top of its estimate."""


def prompt_lengths(
    renderer: Renderer, rows: Sequence[PromptRow], limit: int, refuse: bool
) -> dict[int, int]:
    """Return the tokens of the prompts that may be the longest, by the `id` of the row.

    Args:
        renderer: of the prompts.
        rows: the rows.
        limit: longest prompt, `max_prompt_tokens`.
        refuse: refuse a prompt over the limit.

    Raises:
        UserError: a prompt is empty, cannot be encoded, or is longer than the limit.
    """
    # tokens of the texts, and the tokens that the template adds for each sequence of roles
    counts = renderer.count_tokens(rows, limit)
    added: dict[tuple[str, ...], int] = {}
    for row, count in zip(rows, counts, strict=True):
        if (shape := renderer.shape(row)) not in added and count <= limit:
            added[shape] = len(renderer.encode(row)) - count
    estimates = [
        count + added.get(renderer.shape(row), 0) for row, count in zip(rows, counts, strict=True)
    ]
    # render the three longest, and all that may be over the limit
    longest = set(sorted(range(len(rows)), key=lambda i: estimates[i])[-3:])
    lengths: dict[int, int] = {}
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        may_exceed = estimates[i] + SLACK * (len(row.messages) + 2) > limit
        if count >= HUGE:
            lengths[id(row)] = count
        elif i in longest or not count or may_exceed:
            lengths[id(row)] = len(encode_checked(renderer, row))
        if refuse and lengths.get(id(row), 0) > limit:
            raise UserError(too_long(row, lengths[id(row)], limit))
    return lengths


def encode_checked(renderer: Renderer, row: PromptRow) -> list[int]:
    """Return the tokens of a row's prompt.

    Raises:
        UserError: the prompt is empty, or cannot be encoded.
    """
    tokens = renderer.encode(row)
    if not tokens:
        raise UserError(f"{describe(row)} has no tokens; write a prompt, or take the row out")
    return tokens


def too_long(row: PromptRow, length: int, limit: int) -> str:
    """Return the message for a prompt over the limit.

    Args:
        row: the row.
        length: its tokens.
        limit: longest prompt, `max_prompt_tokens`.
    """
    tokens = f"{len(row.prompt)} characters" if length >= HUGE else f"{length} tokens"
    return (
        f"{describe(row)} has {tokens}, over `data.max_prompt_tokens` ({limit}); raise it, "
        "drop the row, or set `data.overlong: skip`"
    )


def without_overlong(splits: Splits, overlong: set[int], limit: int) -> Splits:
    """Return the splits without rows over the limit, with a warning.

    Args:
        splits: the rows.
        overlong: the `id` of each row over the limit.
        limit: longest prompt, `max_prompt_tokens`.

    Raises:
        UserError: no row is left to train on.
    """
    if not overlong:
        return splits
    train, validation = (
        [row for row in split if id(row) not in overlong]
        for split in (splits.train, splits.validation)
    )
    # count each row once, also if both splits hold it
    rows = list({id(row): row for row in (*splits.train, *splits.validation)}.values())
    first = next(row for row in rows if id(row) in overlong)
    sentence = (
        f"{len(overlong)} of {len(rows)} rows are longer than `data.max_prompt_tokens` ({limit})"
    )
    if not train:
        raise UserError(f"{sentence}, and none is left to train on; raise it")
    rank_zero_warn(f"{sentence} and are skipped; the first is {describe(first)}")
    return Splits(train, validation)
