"""The order in which a masked policy revealed a response, as data and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unicodedata import east_asian_width

from lightning_mpo.types import Rollout

COLORS = (39, 43, 148, 220, 208, 196)
"""Of the 256 colours of a terminal, from the first step to the last: blue, green, yellow, red."""
LEGEND = "below each token: the step that revealed it, from 0; _ is a space"


def reveal_orders(tokenizer: Any, rollout: Rollout) -> list[dict[str, Any]]:
    """Return the texts and the steps of each response's tokens, up to its first end token.

    Args:
        tokenizer: of the policy.
        rollout: from a sampler that records steps.

    Returns:
        A mapping for each response: `tokens` to texts, `steps` to whole numbers.
    """
    assert rollout.reveal_BT is not None
    orders = []
    for ids, steps, mask in zip(
        rollout.responses_BT, rollout.reveal_BT, rollout.response_mask_BT, strict=True
    ):
        texts = tokenizer.batch_decode([[id] for id in ids[mask].tolist()])
        orders.append({"tokens": list(texts), "steps": steps[mask].tolist()})
    return orders


def order_lines(
    tokens: Sequence[str], steps: Sequence[int], *, width: int = 80, color: bool = False
) -> list[str]:
    """Return lines with tokens, and below each the step that revealed it.

    Args:
        tokens: texts of the tokens.
        steps: one number for each.
        width: columns of the terminal.
        color: whether tokens are coloured by their step.

    Example:
        >>> print("\\n".join(order_lines(["4", "2", "<end>"], [1, 10, 0])))
        4 2  <end>
        1 10 0
    """
    lines, last = [], max(steps, default=0)
    above, below, used = "", "", 0
    for text, step in zip(map(_visible, tokens), map(str, steps), strict=True):
        text = text if _columns(text) <= width else text[: width // 2 - 1] + "~"
        cell = max(_columns(text), len(step))
        if used and used + cell > width:
            lines += [above.rstrip(), below.rstrip(), ""]
            above, below, used = "", "", 0
        shown = _colored(text, int(step), last) if color else text
        above += shown + " " * (cell - _columns(text) + 1)
        below += step.ljust(cell + 1)
        used += cell + 1
    return [*lines, above.rstrip(), below.rstrip()]


def _visible(text: str) -> str:
    """Return a token with marks in place of blanks and control characters."""
    marks = {" ": "_", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return "".join(marks.get(c, c if c.isprintable() else "?") for c in text) or "?"


def _columns(text: str) -> int:
    """Return the columns that a text takes in a terminal."""
    return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)


def _colored(text: str, step: int, last: int) -> str:
    """Return a text in the colour of its step."""
    number = COLORS[step * len(COLORS) // (last + 1)]
    return f"\x1b[38;5;{number}m{text}\x1b[0m"
