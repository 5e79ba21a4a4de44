"""Lines of Python files: the prompt is the file so far, and the target is the next line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_mpo.checks import at_least
from lightning_mpo.data.batching import padded_batch
from lightning_mpo.data.code_files import (
    CodeFile,
    describe_skipped,
    indentation,
    read_corpus,
    share_of,
)
from lightning_mpo.data.code_prompts import CodePrompts
from lightning_mpo.data.code_tokens import CodeTokens, line_tokens
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptBatch, PromptRow, Splits

CHARACTERS_PER_TOKEN = 8
"""Characters of a file that are read for each token of the longest prompt."""


class CodeLines(CodePrompts):
    """Lines of Python files, for actions that are thoughts: comments in front of a line of code.

    A prompt is the file before a line, cut to `max_prompt_tokens` at the start of a line, and the
    indentation of the line. The target is the line. Lines are those that begin a statement, but
    for the first one of a file and docstrings. Pieces of code are encoded one by one and their ids
    put together, so the tokens of a line are the same behind a thought and without one.

    Rewards get the columns `file`, `number`, `indentation` and `line`. Encoded rows also have
    `before_ids`, `indent_ids`, `blank_ids` and `line_ids`: the file, the indentation, and the line,
    whose tokens of white space in front of its text stand apart.

    Lines that do not fit are left out; their numbers are printed.

    Args:
        paths: as for `CodePrompts`.
        lines_per_file: most lines of a file, chosen by a hash.
        min_characters: fewest characters of a line, without its indentation.
        max_line_tokens: longest line.
        kwargs: as for `CodePrompts`.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        paths: list[str],
        lines_per_file: int = 16,
        min_characters: int = 12,
        max_line_tokens: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(paths, **kwargs)
        name = type(self).__name__
        at_least(name, 1, lines_per_file=lines_per_file, min_characters=min_characters)
        at_least(name, 1, max_line_tokens=max_line_tokens)
        self.lines_per_file, self.min_characters = lines_per_file, min_characters
        self.max_line_tokens = max_line_tokens
        self._tokens: CodeTokens | None = None

    # --- rows -------------------------------------------------------------------------------------

    def load(self) -> Splits:
        """Read the files and choose lines.

        Raises:
            UserError: there is no usable file, or none is left to train or to validate on.
        """
        corpus = read_corpus(self.paths, self.max_files)
        return self._split(
            corpus.files, corpus.skipped, lambda file: self._rows(file, self.lines_per_file)
        )

    @property
    def code_tokens(self) -> CodeTokens:
        """Encodes pieces of code.

        Raises:
            UserError: `connect` was not called.
        """
        return self._connected(self._tokens)

    def rows_of(self, file: CodeFile) -> list[PromptRow]:
        """Return the rows of all lines of a file that are long enough and fit.

        Args:
            file: a file, also of another corpus.

        Raises:
            UserError: `connect` was not called.
        """
        rows = list(CodeLines._rows(self, file, None))  # a subclass may choose some
        return self._fitting(rows, self._connected(self._tokens), Counter())

    def rows_by_start(self, file: CodeFile) -> list[list[PromptRow]]:
        """Return the rows of `rows_of` in groups whose prompts begin at one line of the file.

        A sampler computes the beginning of such prompts once. The first prompt of a group holds at
        most half of `max_prompt_tokens` before its line, and the last one all of it.

        Args:
            file: a file, also of another corpus.

        Raises:
            UserError: `connect` was not called.
        """
        tokens, groups, start = self.code_tokens, list[list[PromptRow]](), -1
        for row in self.rows_of(file):
            line, indent = row.extra["number"] - 1, row.extra["indentation"]
            before = row.prompt[: len(row.prompt) - len(indent)]
            if start < line - before.count("\n") or not groups:
                half = tokens.last_pieces(before, self.max_prompt_tokens // 2)
                start = line - ("".join(half) or before).count("\n")
                groups.append([])
            groups[-1].append(replace(row, prompt="".join(file.lines[start:line]) + indent))
        return groups

    def _rows(self, file: CodeFile, most_lines: int | None) -> Iterator[PromptRow]:
        """Yield the rows of at most some lines of a file, chosen by a hash; None: of all."""
        first = next(i for i, line in enumerate(file.lines) if line.strip())
        long_enough = [
            i
            for i in file.starts
            if i > first and len(file.lines[i].strip()) >= self.min_characters
        ]
        for i in sorted(self._chosen(file, long_enough)[:most_lines]):
            yield self._row(file, i)

    def _chosen(self, file: CodeFile, positions: Sequence[int]) -> list[int]:
        """Return positions of lines in an order that a hash decides."""
        return sorted(positions, key=lambda i: share_of(f"{file.name}:{i}", self.split_seed))

    def _row(self, file: CodeFile, i: int, stop: int | None = None) -> PromptRow:
        """Return the row of the line at position i; its prompt ends at `stop`, by default there."""
        # no more of the file than the longest prompt can hold
        line, most = file.lines[i], self.max_prompt_tokens * CHARACTERS_PER_TOKEN
        stop = i if stop is None else stop
        start, characters = stop, 0
        while start and characters + len(file.lines[start - 1]) <= most:
            start -= 1
            characters += len(file.lines[start])
        while start < stop and not file.lines[start].strip():  # pieces begin with a line
            start += 1
        indent = indentation(line)
        columns = {"file": file.name, "number": i + 1, "indentation": indent, "line": line}
        return PromptRow(
            prompt="".join(file.lines[start:stop]) + indent,
            target=line.strip(),
            extra=columns,
            where=f"{file.name}:{i + 1}",
        )

    # --- tokens -----------------------------------------------------------------------------------

    def connect(self, tokenizer: Any, end_tokens: Sequence[int] | None = None) -> None:
        """Take the policy's tokenizer, and cut prompts to their lengths.

        Args:
            tokenizer: of the policy.
            end_tokens: not used, as there are no demonstrations.

        Raises:
            UserError: the tokenizer cannot put pieces together, or no row is left.
        """
        first = self._tokens is None
        tokens, skipped = CodeTokens(tokenizer), Counter[str]()
        splits = self.splits
        train = self._fitting(splits.train, tokens, skipped)
        held_out = self._fitting(splits.validation, tokens, skipped)
        fitting = Splits(train, held_out)
        if first:
            rank_zero_info(
                f"data       {type(self).__name__}: {len(train):,} lines to train on, "
                f"{len(held_out):,} held out; skipped lines: {describe_skipped(skipped)}"
            )
        self._refuse_empty(
            fitting,
            "no line",
            f" that fits (skipped: {describe_skipped(skipped)}); raise `data.max_prompt_tokens` "
            "or `data.max_line_tokens`, or take other files",
        )
        self._splits, self._tokens = fitting, tokens
        # the line follows prompt and response when it is scored
        lengths = [self._length(row, tokens) for row in (*train, *held_out)]
        self.longest_prompt = max(lengths)

    def _length(self, row: PromptRow, tokens: CodeTokens) -> int:
        ids = line_tokens(row, tokens)
        return len(ids.before) + len(ids.indent) + len(ids.blank) + len(ids.line)

    def _fitting(
        self, rows: Sequence[PromptRow], tokens: CodeTokens, skipped: Counter[str]
    ) -> list[PromptRow]:
        """Return rows that fit, with prompts of at most `max_prompt_tokens`; count the others."""
        fitting = []
        for row in rows:
            indent = row.extra["indentation"]
            try:
                line = tokens.piece(row.extra["line"])
                room = self.max_prompt_tokens - len(tokens.frame) - len(tokens.piece(indent))
                before = tokens.last_pieces(row.prompt[: len(row.prompt) - len(indent)], room)
            except UserError:
                skipped["with characters that the tokenizer does not know"] += 1
                continue
            if len(line) > self.max_line_tokens:
                skipped["over `data.max_line_tokens`"] += 1
            elif not before:
                skipped["behind a line over `data.max_prompt_tokens`"] += 1
            else:
                fitting.append(replace(row, prompt="".join(before) + indent))
        return fitting

    def encode(self, rows: Sequence[PromptRow]) -> PromptBatch:
        """Tokenise prompts and pad them on the left; the rows get the ids of their pieces.

        Raises:
            UserError: `connect` was not called.
        """
        tokens, encoded, ids = self._connected(self._tokens), [], []
        for row in rows:
            parts = line_tokens(row, tokens)
            columns = {
                "before_ids": parts.before,
                "indent_ids": parts.indent,
                "blank_ids": parts.blank,
                "line_ids": parts.line,
            }
            encoded.append(replace(row, extra={**row.extra, **columns}))
            ids.append([*parts.before, *parts.indent])
        return padded_batch(ids, encoded)
