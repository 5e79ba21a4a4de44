"""Code as tokens: pieces are encoded one by one, and their ids are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_mpo.data.code_files import pieces_of
from lightning_mpo.data.encoding import TextEncoder, name_of
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_PIECES = 200_000
"""Pieces whose tokens are kept."""
TRIED = "def f(x):\n    return x\n"
"""Code on which a tokenizer is tried."""


@dataclass(frozen=True)
class LineTokens:
    """Token ids of one row, piece by piece.

    Args:
        before: the file before the line, with the ids that the tokenizer writes in front.
        indent: the white space in front of the line.
        blank: the tokens of the line that hold white space in front of its text alone.
        line: the other tokens of the line, with its line end.
    """

    before: tuple[int, ...]
    indent: tuple[int, ...]
    blank: tuple[int, ...]
    line: tuple[int, ...]


class CodeTokens:
    """Encodes pieces of code with one tokenizer, and keeps the tokens of each piece.

    Args:
        tokenizer: of the policy.

    Raises:
        UserError: the ids of pieces put together are another text, as with tokenizers that write a
            space in front of each text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.encoder, self._tokenizer = TextEncoder(tokenizer), tokenizer
        self._known: dict[str, tuple[int, ...]] = {}
        try:
            ids = [i for piece in pieces_of(TRIED) for i in self.piece(piece)]
            text = self.decode(ids)
        except UserError:  # an alphabet without these characters
            return
        if text != TRIED:
            raise UserError(
                f"the tokenizer of {name_of(tokenizer)} makes {text!r} of the pieces of {TRIED!r}: "
                "it cannot put tokens of pieces of code together; take another model"
            )

    @property
    def frame(self) -> list[int]:
        """Ids that the tokenizer writes in front of a text."""
        return self.encoder.frame

    def piece(self, text: str) -> tuple[int, ...]:
        """Return the tokens of one piece; control tokens in it are encoded as text.

        Raises:
            UserError: the tokenizer does not know a character, or a control token cannot be encoded
                as text.
        """
        if not text:
            return ()
        if text not in self._known:
            if len(self._known) >= MOST_PIECES:
                self._known.clear()
            ids = self.encoder.encode(text, PromptRow(text, ""))
            self._known[text] = tuple(ids[len(self.frame) :])
        return self._known[text]

    def split_blank(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens in front that hold white space alone, and the other tokens of a piece.

        A tokenizer may write the last blank of an indentation into the token of the first word.
        """
        ids = self.piece(text)
        for count in range(len(ids), 0, -1):
            if not self.decode(ids[:count]).strip():
                return ids[:count], ids[count:]
        return (), ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def pieces(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of several pieces, one after the other."""
        return [i for text in texts for i in self.piece(text)]

    def last_pieces(self, text: str, room: int) -> list[str]:
        """Return the last pieces of a code that have at most `room` tokens together.

        Args:
            text: the code.
            room: tokens.
        """
        last: list[str] = []
        for piece in reversed(pieces_of(text)):
            room -= len(self.piece(piece))
            if room < 0:
                break
            last.insert(0, piece)
        return last


def line_tokens(row: PromptRow, tokens: CodeTokens) -> LineTokens:
    """Return the ids of a row of `CodeLines`.

    Args:
        row: with the columns `indentation` and `line`.
        tokens: encodes the pieces.
    """
    indent = row.extra["indentation"]
    before = row.prompt[: len(row.prompt) - len(indent)]
    return LineTokens(
        (*tokens.frame, *tokens.pieces(pieces_of(before))),
        tokens.piece(indent),
        *tokens.split_blank(row.extra["line"]),
    )
