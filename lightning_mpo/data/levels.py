"""Levels of training rows whose metrics are logged apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Levels:
    """A column of training rows and its values, which all processes know.

    Args:
        column: name of the column in `PromptRow.extra`.
        values: each level; whole numbers of at least 0.
    """

    column: str
    values: tuple[int, ...]
