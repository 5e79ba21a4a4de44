"""A reward with four grades: right and well formed, right, uncertain, wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion
from lightning_mpo.rewards.math import MathAnswer
from lightning_mpo.rewards.thoughts import CLOSE, OPEN, after_thoughts

BEGIN, END = "<answer>", "</answer>"
"""Tags around an answer."""
RIGHT_AND_WELL_FORMED, RIGHT, UNCERTAIN, WRONG = 2.0, 1.0, 0.0, -1.0
PHRASES = (
    *("cannot determine", "cannot be determined", "can not be determined", "unable to determine"),
    *("not enough information", "insufficient information", "i don't know", "i do not know"),
)
"""Phrases that say that an answer is uncertain, in small letters."""


class GradedAnswer(MathAnswer):
    r"""2 if the answer is right and the response well formed, 1 if right, 0 if uncertain, else -1.

        r = 0 if the answer part holds a phrase of uncertainty, whatever else it says,
            2 if right and well formed,  1 if right,  -1 otherwise          [C, SPARKLE's stages]

    An answer is right as `MathAnswer` defines it. The answer part is the text behind thoughts. A
    response is well formed if it has `<think>`, `</think>`, `<answer>` and `</answer>` once each and
    in this order. If the prompt opened the thoughts, `<think>` may be missing [C].

    More than 0.5 is right for pass@1, so both grades of a right answer count there. An uncertain
    response counts as not answered.

    Args:
        phrases: texts that say that the answer is uncertain, in any case of letters; None: `PHRASES`.
            The paper gives "cannot determine" as one of them [C]; the others are ours [I].
        kwargs: as for `MathAnswer`.

    Raises:
        UserError: an option is out of range, or a phrase is empty.

    Example:
        >>> form = "<think>2 + 2</think> <answer>4</answer>"
        >>> well_formed(form, thinking=False), well_formed("<answer>4</answer>", thinking=False)
        (True, False)
    """

    def __init__(self, phrases: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.phrases = tuple(phrase.casefold() for phrase in phrases or ()) or PHRASES
        if phrases == [] or not all(phrase.strip() for phrase in self.phrases):
            raise UserError(
                "`GradedAnswer.phrases` must hold texts; leave it out for the usual ones"
            )

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        rights = super().score(completions)
        return [self._grade(c, right) for c, right in zip(completions, rights, strict=True)]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        answered = super().answered(completions)
        return [
            has_answer and not self.uncertain(completion)
            for completion, has_answer in zip(completions, answered, strict=True)
        ]

    def answers(self, completions: Sequence[Completion]) -> list[str | None]:
        answers = super().answers(completions)
        return [
            None if self.uncertain(completion) else answer
            for completion, answer in zip(completions, answers, strict=True)
        ]

    def uncertain(self, completion: Completion) -> bool:
        """Return whether the part behind thoughts holds a phrase of uncertainty."""
        text = (after_thoughts(completion.text, completion.thinking) or "").casefold()
        plain = " ".join(text.replace("\u2019", "'").split())
        return any(phrase in plain for phrase in self.phrases)

    def _grade(self, completion: Completion, right: float | None) -> float | None:
        """Return the grade of a response; None: its target cannot be read."""
        if right is None:
            return None
        if self.uncertain(completion):
            return UNCERTAIN
        if not right:
            return WRONG
        well = well_formed(completion.text, completion.thinking)
        return RIGHT_AND_WELL_FORMED if well else RIGHT


def well_formed(text: str, thinking: bool) -> bool:
    """Return whether a response has the tags of thoughts and answer once each, in their order.

    Args:
        text: the response.
        thinking: the prompt opened the thoughts, so that `<think>` may be missing.
    """
    tags = [OPEN, CLOSE, BEGIN, END]
    if thinking and OPEN not in text:
        tags = tags[1:]
    places = [text.find(tag) for tag in tags]
    return places == sorted(places) and all(text.count(tag) == 1 for tag in tags)
