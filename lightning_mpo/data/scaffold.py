"""Partial solutions as scaffolds: the first chunks of a solution, given as the beginning of a response.

SparkleRL-PSS (arXiv:2506.04723) trains on problems that a policy never solves: it shows a part of
the reference solution and rewards the rest [C]. `docs/sparkle.md` has the equations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_mpo.checks import at_least
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.chunking import Splitter, WrittenParts, merge_evenly
from lightning_mpo.data.levels import Levels
from lightning_mpo.data.over_data import OverData
from lightning_mpo.data.rows import describe
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow, Splits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Scaffolded(OverData):
    """Training rows of other data, each at several levels of help.

    Level 0 is the row. At level i the prompt goes on, behind the chat template's opening of the
    assistant's turn, with `opening` and the first i chunks of the solution. So the prompt of level i
    is a strict prefix of that of level i + 1. The chunks are part of the prompt: they are never
    sampled, and carry no loss. The row's solution is then the rest.

    Each level of a row is a prompt of its own, so a group never mixes levels. All of them are
    shuffled together. Validation rows have no scaffold. Metrics have reward and flat groups by level.

    A solution of fewer parts than `chunks` has fewer levels; one that cannot be cut has level 0
    alone. Prompts over `max_prompt_tokens` are skipped. The line on the data counts all three. If
    no solution can be cut there is nothing to train on, and the run ends with one line.

    Args:
        base: the data, with solutions. Its options on texts and lengths count.
        chunks: n, the largest number of chunks of a solution.
        levels: levels to train on; None: all.
        whole: whether the last level shows the whole solution. The paper's does [C]. Use it if an
            answer follows the solution, such as one behind `</think>`.
        splitter: finds the parts of a solution.
        opening: text before the first chunk; the paper's is `<think>` and the end of a line [C].
        column: name of the column that holds the level.
        kwargs: as for `OverData`; a `curriculum` may read `column`.

    Raises:
        UserError: an option is out of range, or belongs to this class and was given to `base`; no
            solution can be cut.

    Example:
        >>> from lightning_mpo.data import Multiplication
        >>> from lightning_mpo.data.chunking import Delimiters
        >>> data = Scaffolded(Multiplication(digits=4), chunks=3, splitter=Delimiters(",;"))
        >>> row = data.scaffolds(PromptRow("84*3=", "252", "4*3+0=12,8*3+1=25;252"))[2]
        >>> row.opening, row.solution, row.extra["level"]
        ('4*3+0=12,8*3+1=25;', '252', 2)
    """

    def __init__(
        self,
        base: PromptDataModule,
        chunks: int = 4,
        levels: list[int] | None = None,
        whole: bool = False,
        splitter: Splitter | None = None,
        opening: str = "",
        column: str = "level",
        **kwargs: Any,
    ) -> None:
        super().__init__(base, **kwargs)
        at_least("Scaffolded", 1, chunks=chunks)
        for level in levels or ():
            at_least("Scaffolded", 0, most=chunks - (not whole), levels=level)
        if levels == []:
            raise UserError("`Scaffolded.levels` is empty; leave it out for all levels")
        if not column:
            raise UserError("`Scaffolded.column` must name a column, got an empty text")
        self.chunks, self.whole = chunks, whole
        self.chosen = None if levels is None else sorted(set(levels))
        self.splitter, self.opening, self.column = splitter or WrittenParts(), opening, column
        self._parts: Counter[int] = Counter()

    # --- rows -------------------------------------------------------------------------------------

    def load(self) -> Splits:
        """Return the rows of `base`, those to train on at each level.

        Raises:
            UserError: a row has no solution, or has the column of the level already; no solution
                has enough chunks.
        """
        splits = self.base.load()
        self.shots = self.base.shots
        self._parts.clear()
        train = [row for plain in splits.train for row in self.scaffolds(plain)]
        # a level above 0 must be there, if there is to be one
        levels = range(self.chunks + self.whole) if self.chosen is None else self.chosen
        least = next((level for level in levels if level), None)
        most = max(self._parts, default=0)
        if splits.train and least is not None and most - (not self.whole) < least:
            raise UserError(
                f"`Scaffolded`: no solution of {len(splits.train):,} has a level from {least} on, "
                f"as they have at most {most} parts; set another `Scaffolded.splitter`"
            )
        return Splits(train, splits.validation)

    def scaffolds(self, row: PromptRow) -> list[PromptRow]:
        """Return a row at its levels.

        Args:
            row: with a solution.

        Raises:
            UserError: it has no solution, an opening already, or the column of the level.
        """
        if not row.solution or not row.solution.strip():
            raise UserError(
                f"{describe(row)} has no solution to cut into chunks; `Scaffolded` needs one in "
                "each training row: name its column, or take the row out"
            )
        if row.opening or self.column in row.extra:
            raise UserError(
                f"{describe(row)} has {'an opening' if row.opening else repr(self.column)} already"
                "; name another `Scaffolded.column`, such as `scaffold`"
            )
        parts = merge_evenly(self.splitter.split(row.solution, self.chunks), self.chunks)
        self._parts[len(parts)] += 1
        last = len(parts) if self.whole else len(parts) - 1
        return [
            self._at(row, parts, level)
            for level in range(last + 1)
            if self.chosen is None or level in self.chosen
        ]

    def _at(self, row: PromptRow, parts: Sequence[str], level: int) -> PromptRow:
        """Return a row with the first `level` chunks given."""
        return replace(
            row,
            opening=self.opening * bool(level) + "".join(parts[:level]),
            solution="".join(parts[level:]),
            extra={**row.extra, self.column: level},
        )

    # --- tokens -----------------------------------------------------------------------------------

    def connect(
        self, tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int] | None = None
    ) -> None:
        before = self._counts(self.splits.train)
        first = self._renderer is None
        super().connect(tokenizer, end_tokens)
        self._refuse_ends()
        if first:
            rank_zero_info(f"data       {self._line(before)}")

    def _refuse_ends(self) -> None:
        """Refuse a scaffold with a token that ends a response: nothing could follow it."""
        solutions = self._connected(self._solutions)
        rows = [row for row in self.splits.train if row.opening]
        texts = [row.opening for row in rows]
        encoded = solutions.renderer.encoder.tokenize(texts, rows) if rows else []
        for row, tokens in zip(rows, encoded, strict=True):
            if not set(solutions.end_tokens).isdisjoint(tokens):
                raise UserError(
                    f"the solution of {describe(row)} holds a token that ends a response, so no "
                    "scaffold can be made of it; take it out"
                )

    def _counts(self, rows: Sequence[PromptRow]) -> Counter[int]:
        return Counter(row.extra[self.column] for row in rows)

    def _line(self, before: Counter[int]) -> str:
        """Return the counts of the training rows in one line.

        Args:
            before: rows of each level, before those that are too long were skipped.
        """
        after = self._counts(self.splits.train)
        levels = ", ".join(
            f"{level}: {after[level]:,}"
            + f" ({count - after[level]:,} skipped)" * (count > after[level])
            for level, count in sorted(before.items())
        )
        return f"rows by level {levels}{self._few()}"

    def _few(self) -> str:
        """Return the number of solutions with few chunks, as text; empty: there is none."""
        few = sum(count for parts, count in self._parts.items() if parts < self.chunks)
        if not few or self.chosen == [0]:
            return ""
        uncut = f", {self._parts[1]:,} of them cannot be cut" * bool(self._parts[1])
        return (
            f"; {few:,} of {self._parts.total():,} solutions have fewer than {self.chunks} chunks"
            f"{uncut}"
        )

    @property
    def reported_levels(self) -> Levels:
        """Column and values of the level, for metrics."""
        return Levels(self.column, tuple(sorted(self._counts(self.splits.train))))
