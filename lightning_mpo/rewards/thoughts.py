"""Thoughts of a model that reasons before it answers: `<think>…</think>`."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def ends_in_thoughts(text: str) -> bool:
    """Return whether a text opens thoughts and does not close them.

    Example:
        >>> ends_in_thoughts("<|assistant|><think>"), ends_in_thoughts("<think>so</think> 5")
        (True, False)
    """
    return text.rfind(OPEN) > text.rfind(CLOSE)


def after_thoughts(text: str, thinking: bool = False) -> str | None:
    """Return the answer part of a response: the text after the last `</think>`.

    Args:
        text: the response.
        thinking: the prompt opened the thoughts.

    Returns:
        The whole text if there are no thoughts; None if they were opened and not closed.

    Example:
        >>> after_thoughts("<think>7?</think> It is 5."), after_thoughts("7? no")
        (' It is 5.', '7? no')
        >>> after_thoughts("7? no", thinking=True) is None
        True
    """
    if ends_in_thoughts(text):
        return None
    _, closed, answer = text.rpartition(CLOSE)
    return None if thinking and not closed else answer
