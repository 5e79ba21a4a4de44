"""Lengths of prompts in tokens, counted before training; few prompts are rendered for it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from lightning_mpo.data.rendering import HUGE, Renderer
from lightning_mpo.data.rows import describe
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow

SLACK = 8
"""Tokens per message that a template may add on top of its estimate."""


def prompt_lengths(
    renderer: Renderer, rows: Sequence[PromptRow], limit: int, refuse: bool
) -> tuple[dict[int, int], dict[int, int]]:
    """Return the tokens of the prompts that may be the longest, and those of all prompts.

    The prompts that may be the longest are rendered. The tokens of the others are the tokens of
    their texts, and those that the template adds to such a prompt.

    Args:
        renderer: of the prompts.
        rows: the rows.
        limit: longest prompt, `max_prompt_tokens`.
        refuse: refuse a prompt over the limit.

    Returns:
        Two mappings by the `id` of the row.

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
    return lengths, {
        id(row): lengths.get(id(row), estimate)
        for row, estimate in zip(rows, estimates, strict=True)
    }


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
        "drop the row, or set `data.overlong` to `skip` or `cut`"
    )


def length_line(lengths: Sequence[int], skipped: int, cut: int) -> str:
    """Describe the lengths of prompts in one line.

    Args:
        lengths: tokens of each prompt, without the skipped ones.
        skipped: number of rows that are left out.
        cut: number of prompts that are cut.

    Example:
        >>> length_line([3, 5, 10], skipped=1, cut=0)
        '3 rows, 1 skipped, 0 cut; tokens of a prompt: mean 6.0, median 5, p95 10, max 10'
    """
    p95 = sorted(lengths)[max(0, -(-95 * len(lengths) // 100) - 1)]
    return (
        f"{len(lengths):,} rows, {skipped:,} skipped, {cut:,} cut; tokens of a prompt: "
        f"mean {fmean(lengths):.1f}, median {median(lengths):g}, p95 {p95}, max {max(lengths)}"
    )
