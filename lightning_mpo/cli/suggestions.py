"""Suggests a name that is close to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.66
"""Least similarity of a suggested name: one that is further away leads astray."""


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean …?" if a candidate is close to a name, else nothing."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=NEAR)
    return f"; did you mean `{close[0]}`?" if close else ""
