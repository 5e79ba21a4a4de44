"""Alphabets of any size up to 38,000 characters, the same on every machine."""

from __future__ import annotations

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError

BLOCKS = (range(0x4E00, 0x9FA6), range(0xAC00, 0xD7A4), range(0x3400, 0x4DB6))
"""Code points of ideographs and of Hangul syllables: all printable, none combining or white space.

All are in Unicode 3.0, so each version of Python has them.
"""
MOST = sum(map(len, BLOCKS))
"""Number of these code points."""


def extend_alphabet(characters: str, vocabulary: int, owner: str) -> str:
    """Append code points to an alphabet until it has `vocabulary` characters.

    Args:
        characters: the alphabet, without repeats.
        vocabulary: number of characters of the result.
        owner: name of the class that has the option `vocabulary`, for messages.

    Returns:
        `characters`, then the first code points of `BLOCKS` that it lacks.

    Raises:
        UserError: `vocabulary` is below the size of the alphabet, or too large.

    Example:
        >>> extend_alphabet("01一", 5, "TinyPolicy")
        '01一丁丂'
    """
    most = MOST + len(characters)
    at_least(owner, 1, vocabulary=vocabulary)
    if not len(characters) <= vocabulary <= most:
        raise UserError(
            f"`{owner}.vocabulary` must be from {len(characters)}, the number of the characters "
            f"{characters[:20]!r}, to {most}, got {vocabulary}"
        )
    known = set(characters)
    new = (chr(point) for block in BLOCKS for point in block if chr(point) not in known)
    return characters + "".join(next(new) for _ in range(vocabulary - len(characters)))
