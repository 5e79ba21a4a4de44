"""Tables of rows: their cells, plain numbers, prompts in several rows, and a split by prompts."""

from __future__ import annotations

import difflib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal, InvalidOperation
from typing import Any

import torch

from lightning_mpo.data.reading import WrittenFloat
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Splits

LONGEST_NUMBER = 400
"""Most digits before or behind the point of a number that is written out.

A float64 has at most 324.
"""


def cell(row: Any, column: str, where: str) -> Any:
    """Return the value in a column.

    Raises:
        UserError: the row is not a mapping, or the column is missing or null; `where` is the place
            of the row.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where} must be an object with columns, got {type(row).__name__}")
    if column in row and row[column] is None:
        raise UserError(f"{where}: {column!r} is null")
    if column not in row:
        raise UserError(without(row, column, where))
    return row[column]


def without(row: Mapping[str, Any], column: str, where: str) -> str:
    """Return the message for a row that lacks a column."""
    near = difflib.get_close_matches(column, [str(name) for name in row], n=1)
    hint = f"; did you mean {near[0]!r}?" if near and near[0] != column else ""
    columns = ", ".join([repr(name) for name in row][:20]) + (", …" if len(row) > 20 else "")
    return f"{where} has no {column!r}; its columns are {columns}{hint}"


def text_cell(row: Any, column: str, where: str) -> str:
    """Return the text in a column.

    Raises:
        UserError: it is missing, null or not text, or holds a zero character.
    """
    value = cell(row, column, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} must be text, got {type(value).__name__}")
    return checked_text(value, column, where)


def plain_number(value: Any, where: str) -> str:
    """Write a number without exponent or trailing zeros; a number of a file keeps all its digits.

    Example:
        >>> plain_number(51.0, "row 1"), plain_number("0.50", "row 2"), plain_number(1e-07, "row 3")
        ('51', '0.5', '0.0000001')

    Raises:
        UserError: it is not a number, not finite, or too long to be written out.
    """
    written = value.digits if isinstance(value, WrittenFloat) else str(value)
    try:
        number = Decimal(written.replace(",", "").strip())
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise UserError(f"{where} must be a number, got {value!r}")
    if number and abs(number.adjusted()) > LONGEST_NUMBER:
        raise UserError(
            f"{where} is {written[:40]}, which is too long to be written out; write it as text"
        )
    exact = Context(prec=max(1, len(number.as_tuple().digits)))
    return f"{number.normalize(exact):f}" if number else "0"


def target_cell(row: Any, column: str, where: str) -> str:
    """Return the right answer of a row as text, without surrounding white space.

    Numbers are written by `plain_number`.

    Raises:
        UserError: it is missing, null, NaN or infinite, or a list or an object.
    """
    value = cell(row, column, where)
    if isinstance(value, str):
        return checked_text(value, column, where).strip()
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float, Decimal)):
        if (
            isinstance(value, float)
            and not isinstance(value, WrittenFloat)
            and not math.isfinite(value)
        ):
            raise UserError(f"{where}: {column!r} is {value}; write a finite number, or text")
        return plain_number(value, f"{where}: {column!r}")
    raise UserError(
        f"{where}: {column!r} must be text or a number, got {type(value).__name__}; write one "
        "text; put values for a reward of your own into another column, which it gets in "
        "`Completion.row`"
    )


def checked_text(text: str, column: str, where: str) -> str:
    """Return a text, after a check.

    Raises:
        UserError: it holds a zero character.
    """
    if "\0" in text:
        raise UserError(
            f"{where}: {column!r} holds a zero character (\\u0000) at column "
            f"{text.index(chr(0)) + 1}"
        )
    return text


def prompt_key(row: PromptRow) -> str:
    """Return a key that is equal for rows whose prompts differ in white space only."""
    texts = [row.prompt]
    if row.messages:
        texts = [f"{message.get('role')} {message.get('content')}" for message in row.messages]
    return "\n".join(" ".join(unicodedata.normalize("NFC", text).split()) for text in texts)


def shared_prompts(rows: Sequence[PromptRow], others: Sequence[PromptRow]) -> list[PromptRow]:
    """Return the rows of `others` whose prompt is also in `rows`; white space does not count."""
    keys = {prompt_key(row) for row in rows}
    return [row for row in others if prompt_key(row) in keys]


def contradictions(rows: Sequence[PromptRow]) -> list[tuple[PromptRow, PromptRow]]:
    """Return pairs of rows with the same prompt and different targets, one pair per prompt."""
    first: dict[str, PromptRow] = {}
    pairs: dict[str, tuple[PromptRow, PromptRow]] = {}
    for row in rows:
        key = prompt_key(row)
        if first.setdefault(key, row).target != row.target:
            pairs.setdefault(key, (first[key], row))
    return list(pairs.values())


def split_rows(rows: Sequence[PromptRow], validation_share: float, split_seed: int) -> Splits:
    """Split rows by their prompts; prompts that differ in white space only go to the same side.

    The split depends on the set of prompts and on `split_seed` only, not on the order of the rows.
    Both sides keep that order.

    Args:
        rows: all rows.
        validation_share: below 1 a share of the prompts, from 1 on their number.
        split_seed: seed of the split.

    Raises:
        UserError: the share is not valid, or leaves no prompt to train on.
    """
    # the different prompts, sorted
    keys = [prompt_key(row) for row in rows]
    smallest: dict[str, str] = {}
    for key, row in zip(keys, rows, strict=True):
        smallest[key] = min(smallest.get(key, row.prompt), row.prompt)
    prompts = sorted(smallest, key=lambda key: (smallest[key], key))
    # number of prompts to hold out
    if not validation_share >= 0 or (
        validation_share >= 1 and not float(validation_share).is_integer()
    ):
        raise UserError(
            "`data.validation_share` must be a share below 1 or a whole number of prompts, got "
            f"{validation_share}"
        )
    count = (
        int(validation_share)
        if validation_share >= 1
        else math.floor(validation_share * len(prompts) + 0.5)
    )
    if rows and count >= len(prompts):
        raise UserError(
            f"`data.validation_share` ({validation_share}) takes {count} of the {len(prompts)} "
            "different prompts and leaves none to train on"
        )
    # draw them
    order = torch.randperm(
        len(prompts), generator=torch.Generator().manual_seed(split_seed)
    ).tolist()
    held_out = {prompts[i] for i in order[:count]}
    return Splits(
        train=[row for row, key in zip(rows, keys, strict=True) if key not in held_out],
        validation=[row for row, key in zip(rows, keys, strict=True) if key in held_out],
    )
