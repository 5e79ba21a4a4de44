"""Prompts over `max_prompt_tokens`: refused, skipped, or cut to their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from lightning_mpo.data.lengths import length_line, prompt_lengths
from lightning_mpo.data.rendering import SYSTEM, Renderer
from lightning_mpo.data.rows import describe
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Splits

Overlong = Literal["refuse", "skip", "cut"]


def each_row(splits: Splits) -> list[PromptRow]:
    """Return the rows of both splits; a row that is in both is there once."""
    return list({id(row): row for row in (*splits.train, *splits.validation)}.values())


@dataclass(frozen=True)
class FittedPrompts:
    """Rows whose prompts fit.

    Args:
        splits: the rows.
        longest: tokens of the longest prompt.
        line: the lengths of training prompts in one line.
    """

    splits: Splits
    longest: int
    line: str


def fit_prompts(
    renderer: Renderer, splits: Splits, limit: int, overlong: Overlong
) -> FittedPrompts:
    """Return the rows whose prompts have at most `limit` tokens, with a warning of the others.

    Args:
        renderer: of the prompts.
        splits: the rows; a row may be in both.
        limit: longest prompt, `max_prompt_tokens`.
        overlong: "refuse", "skip", or "cut": the end of the prompt stays.

    Raises:
        UserError: a prompt is refused or cannot be encoded, or no row is left to train on.
    """
    # tokens of each prompt
    rows = each_row(splits)
    rendered, lengths = prompt_lengths(renderer, rows, limit, refuse=overlong == "refuse")
    long = [row for row in rows if lengths[id(row)] > limit]
    # cut them, or leave them out
    fitted = {id(row): row for row in rows if lengths[id(row)] <= limit}
    if overlong == "cut":
        fitted |= {id(row): cut_to_end(renderer, row, limit) for row in long}
        lengths |= {id(row): len(renderer.encode(fitted[id(row)])) for row in long}
    train, validation = (
        [fitted[id(row)] for row in split if id(row) in fitted]
        for split in (splits.train, splits.validation)
    )
    if long:
        _warn(long, len(rows), limit, overlong, bool(train))
    # the longest prompt, and a line on training prompts
    exact = {*rendered, *map(id, long)} & set(fitted)
    longest = max((lengths[i] for i in exact), default=0)
    cut = sum(id(row) in set(map(id, long)) for row in splits.train) if overlong == "cut" else 0
    line = length_line(
        [lengths[id(row)] for row in splits.train if id(row) in fitted],
        skipped=len(splits.train) - len(train),
        cut=cut,
    )
    return FittedPrompts(Splits(train, validation), longest, line)


def _warn(
    long: Sequence[PromptRow], rows: int, limit: int, overlong: Overlong, trains: bool
) -> None:
    """Warn of rows over the limit; refuse them if none is left to train on."""
    sentence = f"{len(long)} of {rows} rows are longer than `data.max_prompt_tokens` ({limit})"
    if not trains:
        raise UserError(f"{sentence}, and none is left to train on; raise it")
    effect = "skipped" if overlong == "skip" else "cut to their ends"
    rank_zero_warn(f"{sentence} and are {effect}; the first is {describe(long[0])}")


def cut_to_end(renderer: Renderer, row: PromptRow, limit: int) -> PromptRow:
    """Return a row whose prompt is the end of the prompt of another row.

    A chat loses its oldest turns, but no system message. Then the text of the last message loses
    characters at its front.

    Args:
        renderer: of the prompts.
        row: the row.
        limit: most tokens of the rendered prompt.

    Raises:
        UserError: the text around the prompt alone is longer.
    """

    def fits(candidate: PromptRow) -> bool:
        if renderer.count_tokens([candidate], limit)[0] > limit:
            return False
        return len(renderer.encode(candidate)) <= limit

    # drop the oldest turns, up to a message of the user
    messages = row.messages
    start = sum(message["role"] in SYSTEM for message in messages[:1])
    users = [i for i, message in enumerate(messages) if message["role"] == "user" and i > start]
    while users and not fits(row):
        row = replace(row, messages=(*messages[:start], *messages[users.pop(0) :]))
    if fits(row):
        return row
    # the most characters that fit, by bisection
    text, least = row.prompt, 0
    most = min(len(text), limit * renderer.encoder.longest_token)
    while least < most:
        middle = (least + most + 1) // 2
        if fits(_with_text(row, text[-middle:])):
            least = middle
        else:
            most = middle - 1
    if not least:
        raise UserError(
            f"no end of {describe(row)} fits into `data.max_prompt_tokens` ({limit}); raise it, or "
            "shorten the text around prompts"
        )
    return _with_text(row, text[-least:])


def _with_text(row: PromptRow, text: str) -> PromptRow:
    """Return a row with another text of its prompt."""
    messages = row.messages and (*row.messages[:-1], {**row.messages[-1], "content": text})
    return replace(row, prompt=text, messages=messages)
