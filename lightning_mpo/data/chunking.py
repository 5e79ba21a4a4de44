"""Solutions in chunks: the parts of a written solution, merged evenly into at most n chunks.

A splitter finds the places between the parts. No character is lost: the chunks, one after the other,
are the solution. White space between two parts belongs to the first one if it holds the end of a
line, else to the second one, as tokens of words begin with their space.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError

BLANK_LINES = re.compile(r"\s*\n[ \t]*\n\s*")
"""Matches between paragraphs."""
ITEMS = re.compile(r"\s*\n\s*(?=(?:\d+[.)]|\(\d+\)|[Ss]tep\s+\d+[.:)]?|[-*•])\s)")
"""Matches before an item of a list, at the beginning of its line."""
HEADINGS = re.compile(r"\s*\n\s*(?=#{1,6}\s|\*\*[^*\n]+\*\*:?\s*(?:\n|$))")
"""Matches before a heading: `## Sum`, or a line in bold type."""
SENTENCES = re.compile(r"\s*\n\s*|(?<=[.!?])[ \t]+")
"""Matches between sentences, and between lines."""
ORDER = (BLANK_LINES, ITEMS, HEADINGS, SENTENCES)
"""The kinds of places, in the order in which they are tried."""


class Splitter(ABC):
    """Finds the parts of a solution."""

    @abstractmethod
    def split(self, text: str, chunks: int) -> list[str]:
        """Return the parts of a text; one after the other, they are the text.

        Args:
            text: a solution.
            chunks: number of chunks that are wanted.
        """


class WrittenParts(Splitter):
    """Paragraphs; or else numbered items, headings or sentences.

    The first of these four kinds that gives as many parts as there should be chunks is taken
    [C, preparation of stage 2]. If none does, the one with the most parts is, and the
    first of equals [I].

    Example:
        >>> WrittenParts().split("It is 3. So 3 + 4 = 7.\\nThe answer is 7.", 3)
        ['It is 3.', ' So 3 + 4 = 7.\\n', 'The answer is 7.']
    """

    def split(self, text: str, chunks: int) -> list[str]:
        parts: list[str] = [text]
        for pattern in ORDER:
            candidate = cut_at(text, pattern)
            if len(candidate) >= chunks:
                return candidate
            parts = max(parts, candidate, key=len)
        return parts


class Delimiters(Splitter):
    """Parts that end with one of some characters, such as the steps of generated problems.

    Args:
        characters: each of them ends a part.

    Raises:
        UserError: there is no character.

    Example:
        >>> Delimiters(",;").split("4*3+0=12,8*3+1=25;252", 3)
        ['4*3+0=12,', '8*3+1=25;', '252']
    """

    def __init__(self, characters: str = ",;") -> None:
        if not characters:
            raise UserError("`Delimiters.characters` must hold at least one character")
        self.characters = characters

    def split(self, text: str, chunks: int) -> list[str]:
        return cut_at(text, re.compile(rf"(?<=[{re.escape(self.characters)}])"))


def cut_at(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Cut a text at the matches of a pattern; no part is empty or white space alone.

    Args:
        text: the text.
        pattern: matches the white space between two parts, or no character.
    """
    # white space at both ends of the text separates nothing
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    places = [0]
    for match in pattern.finditer(text):
        if first < match.start() and match.end() < last:
            places.append(match.end() if "\n" in match[0] else match.start())
    places.append(len(text))
    parts = [text[a:b] for a, b in pairwise(places)]
    return parts if text.strip() else [text]


def merge_evenly(parts: Sequence[str], chunks: int) -> list[str]:
    """Join neighbouring parts into chunks whose numbers of parts differ by at most 1.

    Chunk i of n ends behind part ⌊i·m / n⌋ of m. Fewer parts than `chunks` stay as they are.

    Args:
        parts: m parts.
        chunks: n, the largest number of chunks.

    Raises:
        UserError: `chunks` is below 1.

    Example:
        >>> merge_evenly(["a", "b", "c", "d", "e"], 2)
        ['ab', 'cde']
    """
    at_least("merge_evenly", 1, chunks=chunks)
    n, m = min(chunks, len(parts)), len(parts)
    return ["".join(parts[i * m // n : (i + 1) * m // n]) for i in range(n)]
