"""Ids of tokens that options name by id or by text."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mpo.errors import UserError


def exact_ids(option: str, tokens: Sequence[int | str], texts: Sequence[str]) -> list[int]:
    """Return the ids of tokens; a text is that of one token.

    Args:
        option: name of the option, for messages.
        tokens: ids, or texts of single tokens.
        texts: text of each token of the vocabulary.

    Raises:
        UserError: an id is not in the vocabulary, or no single token has the text.

    Example:
        >>> exact_ids("tokens", ["#", 0], ["a", "#", "#a"])
        [1, 0]
    """
    ids = [token if isinstance(token, int) else _of_text(option, token, texts) for token in tokens]
    wrong = next((i for i in ids if not 0 <= i < len(texts)), None)
    if wrong is not None:
        raise UserError(f"`{option}` holds the id {wrong}; the policy has 0 to {len(texts) - 1}")
    return ids


def ids_containing(option: str, tokens: Sequence[int | str], texts: Sequence[str]) -> list[int]:
    """Return the ids of tokens, and for a text those of all tokens that contain it, in order.

    Args:
        option: name of the option, for messages.
        tokens: ids, or texts of single tokens.
        texts: text of each token of the vocabulary.

    Raises:
        UserError: an id is not in the vocabulary, or no single token has the text.

    Example:
        >>> ids_containing("stop", ["#"], ["a", "#", "#a"])
        [1, 2]
    """
    ids = set(exact_ids(option, tokens, texts))
    for token in tokens:
        if isinstance(token, str):
            ids |= {i for i, text in enumerate(texts) if token in text}
    return sorted(ids)


def check_tokens(option: str, tokens: Sequence[int | str]) -> None:
    """Refuse tokens that are no ids and no texts, and empty texts.

    Raises:
        UserError: names the option and the token.
    """
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int | str) or token == "":
            raise UserError(
                f"`{option}` must hold ids or texts of tokens, got {token!r}; write texts in quotes"
            )
        if isinstance(token, int) and not 0 <= token < 2**31:
            raise UserError(f"`{option}` must hold ids from 0 on, got {token}")


def _of_text(option: str, token: str, texts: Sequence[str]) -> int:
    try:
        return list(texts).index(token)
    except ValueError:
        raise UserError(
            f"`{option}` holds {token!r}, which is not the text of one token of the policy; give "
            "texts of single tokens, or their ids"
        ) from None
