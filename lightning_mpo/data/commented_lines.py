"""Demonstrations of thoughts: the comments that stand in front of lines of Python files."""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning_mpo.checks import at_least
from lightning_mpo.data.code_files import CodeFile, comment_above
from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.data.code_tokens import CodeTokens
from lightning_mpo.data.solutions import rollout_of
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Rollout

MARK = "# "
"""Beginning of a comment that is a demonstration."""
ACT = "\n"
"""The demonstration of a line without a comment."""


class CommentedLines(CodeLines):
    """Lines behind a comment, and as many lines without one, for the supervised stage of RA3.

    The demonstration of a line behind a comment is that comment with its line end, and its prompt
    is the file before the comment. The demonstration of another line is a line break: an act
    without a thought. So a policy that imitates them thinks in about half of all cases, with
    thoughts such as people write [I] (docs/ra3.md).

    A comment is one line at the column of the line behind it, with a blank behind `#`. Comments
    that are code themselves, and those over `max_comment_tokens`, are left out.

    Args:
        paths: as for `CodeLines`.
        lines_per_file: most lines of each kind in a file.
        max_comment_tokens: longest comment, with its line end.
        kwargs: as for `CodeLines`.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        paths: list[str],
        lines_per_file: int = 16,
        max_comment_tokens: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(paths, lines_per_file, **kwargs)
        at_least(type(self).__name__, 2, max_comment_tokens=max_comment_tokens)
        self.max_comment_tokens = max_comment_tokens

    def _rows(self, file: CodeFile, most_lines: int | None) -> Iterator[PromptRow]:
        """Yield rows of lines behind a comment, and as many of other lines, in their order."""
        usable = [i for i in file.starts if len(file.lines[i].strip()) >= self.min_characters]
        behind = [i for i in usable if comment_of(file, i) is not None]
        others = [i for i in usable if i > 0 and not file.lines[i - 1].strip().startswith("#")]
        commented = self._chosen(file, behind)[:most_lines]
        plain = self._chosen(file, others)[: len(commented)]
        for i in sorted([*commented, *plain]):
            comment = comment_of(file, i)
            if comment is None:
                yield replace(self._row(file, i), solution=ACT)
            else:
                yield replace(self._row(file, i, i - 1), solution=comment)

    def _fitting(
        self, rows: Sequence[PromptRow], tokens: CodeTokens, skipped: Counter[str]
    ) -> list[PromptRow]:
        fitting = []
        for row in super()._fitting(rows, tokens, skipped):
            if len(tokens.piece(row.solution or ACT)) > self.max_comment_tokens:
                skipped["behind a comment over `data.max_comment_tokens`"] += 1
            else:
                fitting.append(row)
        return fitting

    # --- demonstrations ---------------------------------------------------------------------------

    def check_solutions(self, positions: int | None = None, canvas: int | None = None) -> None:
        if canvas is not None:
            raise UserError(
                "`CommentedLines` has demonstrations for a causal policy, which end with their "
                "line; a masked policy fills a canvas"
            )
        longest = self.longest_prompt + self.max_comment_tokens
        if positions is not None and longest > positions:
            raise UserError(
                f"`CommentedLines`: a prompt, its comment and its line have up to {longest} "
                f"tokens, more than the model's {positions} positions; lower "
                "`data.max_prompt_tokens`"
            )

    def solutions(self, rows: Sequence[PromptRow], canvas: int | None = None) -> Rollout:
        """Return demonstrations as sampled responses, which end with their line."""
        tokens = self._connected(self._tokens)
        return rollout_of(self.encode(rows), [tokens.piece(row.solution or ACT) for row in rows])


def comment_of(file: CodeFile, i: int) -> str | None:
    """Return the comment in front of a line, from `#` to its line end; None: there is none to use.

    Args:
        file: the file.
        i: position of the line.
    """
    text = comment_above(file, i)
    if text is None or not text.startswith(MARK) or is_code(text.removeprefix(MARK)):
        return None
    return f"{text}\n"


def is_code(text: str) -> bool:
    """Return whether a text is a Python program.

    Example:
        >>> is_code("x = 1"), is_code("the first of them")
        (True, False)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text.strip())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True
