"""Windows of Python files with and without thoughts: next-token training, the M-step of RA3."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mpo.checks import at_least
from lightning_mpo.data.annotations import AnnotatedFile, read_without_thoughts
from lightning_mpo.data.batching import padded_batch
from lightning_mpo.data.code_files import describe_skipped, indentation, pieces_of, share_of
from lightning_mpo.data.code_prompts import CodePrompts
from lightning_mpo.data.code_tokens import CodeTokens
from lightning_mpo.data.solutions import rollout_of
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptBatch, PromptRow, Rollout, Splits

CODE, THOUGHT, FRAME = 0, 1, 2
"""What a token is: a part of the file, of a thought in it, or of what surrounds a file."""
PLAIN, BEHIND_THOUGHTS, THOUGHTS = "code", "code_behind_thoughts", "thoughts"
"""Tokens of held-out files whose mean is a metric of its own."""


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive tokens.

    Args:
        before: the token in front of the first one, from which that is predicted.
        ids: the tokens.
        kinds: CODE, THOUGHT or FRAME for each of them.
    """

    before: int
    ids: tuple[int, ...]
    kinds: bytes


class CodeWindows(CodePrompts):
    """Windows of Python files, for `SupervisedWarmup`: the policy learns all tokens of a window.

    The files to train on are one sequence, an end token behind each of them, cut into windows of
    `window` tokens. So all updates have equally many tokens, with thoughts and without [I].

    A folder that `annotate` wrote has thoughts in its files. Held-out files depend on a hash of
    their text without thoughts, so they are those of `CodeLines` on the files before `annotate`,
    with equal `validation_share` and `split_seed`. Held-out windows have `window` tokens of code.
    Each is scored without thoughts, and where it has thoughts once more with them, so both means
    are over the same tokens of code.

    Args:
        paths: as for `CodePrompts`.
        window: tokens of a window.
        thoughts: train on the files with their thoughts; False: without.
        validation_prompts: most windows that are validated, chosen by a hash; None: all.
        kwargs: as for `CodePrompts`.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        paths: list[str],
        window: int = 512,
        thoughts: bool = True,
        validation_prompts: int | None = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(paths, validation_prompts=validation_prompts, **kwargs)
        at_least(type(self).__name__, 2, window=window)
        self.window, self.thoughts = window, thoughts

    # --- files ------------------------------------------------------------------------------------

    def load(self) -> Splits:
        """Read the files: one row each, with the text without thoughts, and the thoughts.

        Raises:
            UserError: there is no usable file, or none is left to train or to validate on.
        """
        corpus = read_without_thoughts(self.paths, self.max_files)
        thoughts = sum(len(file.thoughts) for file in corpus.files)
        splits = self._split(
            corpus.files, corpus.skipped, _rows_of, absence="none", note=f"{thoughts:,} thoughts; "
        )
        # a sequence that does not depend on the order of a folder
        order = sorted(
            splits.train, key=lambda row: (share_of(row.where, self.split_seed), row.where)
        )
        return Splits(order, splits.validation)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"window": self.window, "thoughts": self.thoughts}

    # --- tokens -----------------------------------------------------------------------------------

    def connect(self, tokenizer: Any, end_tokens: Sequence[int] | None = None) -> None:
        """Take the policy's tokenizer, and cut the files into windows.

        Args:
            tokenizer: of the policy.
            end_tokens: ids that end a response, of which the first one stands behind each file.

        Raises:
            UserError: the tokenizer cannot put pieces together, there is no end token, or no window
                is left.
        """
        tokens, skipped = CodeTokens(tokenizer), Counter[str]()
        ends = [i for i in (*(end_tokens or ()), tokenizer.eos_token_id) if i is not None]
        if not ends:
            raise UserError(
                f"`{type(self).__name__}` puts an end token behind each file, and the tokenizer "
                "has none; give it an `eos_token`"
            )
        first = self._loaded is self._splits or self._loaded is None
        _, loaded = self.splits, self._loaded
        assert loaded is not None  # `splits` loads
        train = self._cut(loaded.train, tokens, ends[0], skipped)
        held_out = list(self._held_out(loaded.validation, tokens, ends[0], skipped))
        held_out.sort(key=lambda row: share_of(row.where, self.split_seed))
        if first:
            rank_zero_info(
                f"data       {type(self).__name__}: {len(train):,} windows of {self.window} tokens "
                f"to train on, {len(held_out):,} held out; skipped files: "
                f"{describe_skipped(skipped)}"
            )
        windows = Splits(train, held_out)
        self._refuse_empty(
            windows,
            "no window",
            f" (skipped files: {describe_skipped(skipped)}); lower `data.window`, or give more "
            "files",
        )
        self._splits, self.longest_prompt = windows, 1

    def _cut(
        self, files: Sequence[PromptRow], tokens: CodeTokens, end: int, skipped: Counter[str]
    ) -> list[PromptRow]:
        """Return the windows of all files put together; what is left at the end is dropped."""
        ids, kinds = [end], bytearray([FRAME])
        for file in files:
            for some, kind in self._encoded(file, tokens, skipped):
                if kind != THOUGHT or self.thoughts:
                    ids += some
                    kinds += bytes([kind]) * len(some)
            ids.append(end)
            kinds.append(FRAME)
        W, rows = self.window, []
        for i in range(0, len(ids) - W, W):
            inside = slice(i + 1, i + 1 + W)
            rows.append(
                _row(f"token {i}", Window(ids[i], tuple(ids[inside]), bytes(kinds[inside])))
            )
        return rows

    def _held_out(
        self, files: Sequence[PromptRow], tokens: CodeTokens, end: int, skipped: Counter[str]
    ) -> Iterator[PromptRow]:
        """Yield windows of each file with `window` tokens besides thoughts; the last has fewer."""
        for file in files:
            pieces = self._encoded(file, tokens, skipped)
            sequence = [(token, kind) for some, kind in pieces for token in some]
            before, window, size, first = end, list[tuple[int, int]](), 0, 0
            for i, (token, kind) in enumerate(sequence, start=1):
                window.append((token, kind))
                size += kind != THOUGHT
                if size == self.window or i == len(sequence):
                    ids, kinds = zip(*window, strict=True)
                    yield _row(f"{file.where}:{first}", Window(before, ids, bytes(kinds)))
                    before, window, size, first = token, [], 0, first + size

    def _encoded(
        self, file: PromptRow, tokens: CodeTokens, skipped: Counter[str]
    ) -> list[tuple[Sequence[int], int]]:
        """Return the tokens of a file piece by piece, and the kind of each piece.

        The pieces of code are the same with thoughts and without. A thought has the tokens with
        which an E-step writes it: the indentation, then the comment.
        """
        thoughts: Mapping[int, str] = dict(file.extra["thoughts"])
        encoded: list[tuple[Sequence[int], int]] = [(tokens.frame, FRAME)]
        line, placed = 0, 0
        try:
            for piece in pieces_of(file.prompt):
                if line in thoughts:
                    indent = tokens.piece(indentation(piece))
                    encoded.append(((*indent, *tokens.piece(f"{thoughts[line]}\n")), THOUGHT))
                    placed += 1
                encoded.append((tokens.piece(piece), CODE))
                line += piece.count("\n")
        except UserError:
            skipped["with characters that the tokenizer does not know"] += 1
            return []
        if placed < len(thoughts):
            raise UserError(
                f"{file.where!r} has a thought in front of a blank line or its first line, where "
                "`annotate` writes none; annotate the files again"
            )
        return encoded

    # --- rows -------------------------------------------------------------------------------------

    @property
    def validation_rows(self) -> Sequence[PromptRow]:
        """The first held-out windows without thoughts, then those with thoughts once more."""
        rows = self.splits.validation[: self.validation_prompts]
        if self._splits is self._loaded:
            return rows
        plain = [_row(row.where, without_thoughts(row.extra["window"])) for row in rows]
        return [*plain, *(row for row in rows if THOUGHT in row.extra["window"].kinds)]

    def encode(self, rows: Sequence[PromptRow]) -> PromptBatch:
        """Return the token in front of each window."""
        return padded_batch([[row.extra["window"].before] for row in rows], rows)

    def check_solutions(self, positions: int | None = None, canvas: int | None = None) -> None:
        if canvas is not None:
            raise UserError(
                f"`{type(self).__name__}` is for a causal policy; a masked policy fills a canvas"
            )
        every = (*self.splits.train, *self.validation_rows)
        longest = 1 + max(len(row.extra["window"].ids) for row in every)
        if positions is not None and longest > positions:
            raise UserError(
                f"`{type(self).__name__}`: a window with its thoughts has up to {longest} tokens, "
                f"more than the model's {positions} positions; lower `data.window`"
            )

    def solutions(self, rows: Sequence[PromptRow], canvas: int | None = None) -> Rollout:
        """Return the tokens of windows as responses to the token in front of them."""
        return rollout_of(self.encode(rows), [row.extra["window"].ids for row in rows])

    def token_parts(self, rows: Sequence[PromptRow]) -> dict[str, Tensor]:
        windows = [row.extra["window"] for row in rows]
        T = max(len(window.ids) for window in windows)
        # a mean over no token is no metric
        some = self.splits.validation[: self.validation_prompts]
        thoughts = any(THOUGHT in row.extra["window"].kinds for row in some)
        names = (PLAIN, BEHIND_THOUGHTS, THOUGHTS) if thoughts else (PLAIN,)
        parts = {name: torch.zeros(len(rows), T, dtype=torch.bool) for name in names}
        for b, window in enumerate(windows):
            kinds_W = torch.tensor(list(window.kinds))
            has_thoughts = THOUGHT in window.kinds
            code = BEHIND_THOUGHTS if has_thoughts else PLAIN
            parts[code][b, : len(kinds_W)] = kinds_W == CODE
            if has_thoughts:
                parts[THOUGHTS][b, : len(kinds_W)] = kinds_W == THOUGHT
        return parts


def without_thoughts(window: Window) -> Window:
    """Return a window without the tokens of its thoughts."""
    code = [(i, kind) for i, kind in zip(window.ids, window.kinds, strict=True) if kind != THOUGHT]
    return Window(window.before, tuple(i for i, _ in code), bytes(kind for _, kind in code))


def _rows_of(file: AnnotatedFile) -> list[PromptRow]:
    """Return the row of a file: its text without thoughts, and the thoughts."""
    columns = {"file": file.name, "thoughts": [list(pair) for pair in file.thoughts.items()]}
    return [PromptRow(prompt=file.text, target="", extra=columns, where=file.name)]


def _row(where: str, window: Window) -> PromptRow:
    return PromptRow(prompt="", target="", extra={"window": window}, where=where)
