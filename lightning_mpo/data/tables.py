"""What data modules that read tables share: cells, plain numbers, and a split that never leaks a prompt."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import torch

from lightning_mpo.data.base import Splits
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow


def cell(row: Any, column: str, where: str) -> Any:
    """Return `row[column]`.

    Raises:
        UserError: the row is no mapping, or has no such column or an empty one; `where` says which row it is.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where} must be an object with columns, got {type(row).__name__}")
    if row.get(column) is None:
        near = difflib.get_close_matches(column, list(row), n=1)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] != column else ""
        raise UserError(f"{where} has no {column!r}; its columns are {', '.join(map(repr, row))}{hint}")
    return row[column]


def text_cell(row: Any, column: str, where: str) -> str:
    """Return `row[column]`, which must be text."""
    value = cell(row, column, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} must be text, got {type(value).__name__}")
    return value


def plain_number(value: Any, where: str) -> str:
    """Write a number without exponent or trailing zeros.

    Example:
        >>> plain_number(51.0, "row 1"), plain_number("0.50", "row 2")
        ('51', '0.5')
    """
    try:
        number = Decimal(str(value).replace(",", "").strip())
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise UserError(f"{where} must be a number, got {value!r}")
    return f"{number.normalize():f}" if number else "0"


def split_rows(rows: Sequence[PromptRow], validation_share: float, split_seed: int) -> Splits:
    """Split rows by their prompts, so that equal prompts stand on one side.

    The split depends on the set of prompts and on `split_seed` only, not on the order of the rows. Both sides keep it.

    Args:
        validation_share: below 1 a share of the prompts, from 1 on their number.
        split_seed: seed of the split.
    """
    prompts = sorted({row.prompt for row in rows})
    if not validation_share >= 0 or (validation_share >= 1 and not float(validation_share).is_integer()):
        raise UserError(
            f"`data.validation_share` must be a share below 1 or a whole number of prompts, got {validation_share}"
        )
    count = int(validation_share) if validation_share >= 1 else math.floor(validation_share * len(prompts) + 0.5)
    if rows and count >= len(prompts):
        raise UserError(
            f"`data.validation_share` ({validation_share}) takes {count} of the {len(prompts)} different prompts and "
            "leaves none to train on"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(split_seed)).tolist()
    held_out = {prompts[i] for i in order[:count]}
    return Splits(
        train=[row for row in rows if row.prompt not in held_out],
        validation=[row for row in rows if row.prompt in held_out],
    )
