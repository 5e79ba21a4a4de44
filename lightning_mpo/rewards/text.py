"""Rewards that compare strings, or look for patterns in them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import regex

from lightning_mpo.checks import positive
from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion, Reward, RewardError
from lightning_mpo.rewards.thoughts import after_thoughts


class ExactAnswer(Reward):
    """1 if the text after the last `separator` equals the target, else 0.

    A response that did not finish gets 0.

    Surrounding white space and zeros at the end of a decimal do not count: 72.0 equals 72. After
    thoughts, only the text behind `</think>` is read. A row with an empty target is not judged.

    Args:
        separator: the text before the answer; None: the whole response is the answer.
        weight: factor of this reward in the sum.
    """

    is_accuracy = True

    def __init__(self, separator: str | None = ";", weight: float = 1.0) -> None:
        super().__init__(weight)
        if separator == "":
            raise UserError(
                "`ExactAnswer.separator` must not be empty: it marks where the answer begins, "
                "such as `####`; write null if the whole response is the answer"
            )
        self.separator = separator

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [self._score(completion) for completion in completions]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        return [self._answer(completion) is not None for completion in completions]

    def answers(self, completions: Sequence[Completion]) -> list[str | None]:
        answers = [self._answer(completion) for completion in completions]
        return [None if answer is None else _plain(answer) for answer in answers]

    def _score(self, completion: Completion) -> float | None:
        target = completion.target.strip()
        if not target:
            return None
        answer = self._answer(completion)
        return float(
            completion.finished and answer is not None and _plain(answer) == _plain(target)
        )

    def _answer(self, completion: Completion) -> str | None:
        text = after_thoughts(completion.text, completion.thinking) or ""
        if self.separator is None:
            return text.strip() or None
        return (
            text.rpartition(self.separator)[2].strip() or None if self.separator in text else None
        )


def _plain(text: str) -> str:
    """Write a decimal without trailing zeros: pandas writes 72 as 72.0 if its column has gaps.

    Example:
        >>> _plain("72.0"), _plain("-0.50"), _plain("1.2.0")
        ('72', '-0.5', '1.2.0')
    """
    if not re.fullmatch(r"-?\d+\.\d+", text):
        return text
    plain = text.rstrip("0").rstrip(".")
    return "0" if plain == "-0" else plain


class ChoiceAnswer(Reward):
    r"""1 if the response chooses the letter of the target, else 0.

    The choice is the last one of the first form that the response has: `<answer>C</answer>` or
    `\boxed{C}`; "the answer is C" or "answer: (C)"; a letter that begins the response, as in "C" or
    "C) Paris"; "(C)". After thoughts, only the text behind `</think>` is read. A row whose target is
    no letter such as `C` or `(C)` is not judged.

    Args:
        letters: the letters of the choices.
        weight: factor of this reward in the sum.

    Raises:
        UserError: `letters` are not distinct letters.

    Example:
        >>> ChoiceAnswer().choice("A or B? I think the answer is **(B)**.")
        'B'
    """

    is_accuracy = True

    def __init__(self, letters: str = "ABCDE", weight: float = 1.0) -> None:
        super().__init__(weight)
        if not letters.isalpha() or len(set(letters.upper())) != len(letters):
            raise UserError(
                f"`ChoiceAnswer.letters` must be distinct letters such as ABCDE, got {letters!r}"
            )
        upper, either = f"[{letters.upper()}]", f"[{letters.upper()}{letters.lower()}]"
        # the word "a" is no choice: a small letter needs brackets, or nothing behind it
        letter = rf"(?:[*_$\s]*\(({either})\)|[*_$\s]*({upper})(?!\w)|[*_$\s]*({either})\W*$)"
        self._target = re.compile(rf"\W*({either})\W*")
        self._forms = [
            re.compile(
                rf"<answer>\W*({either})\W*</answer>|\\boxed\{{\W*(?:\\text\{{)?\W*({either})\W*\}}"
            ),
            re.compile(rf"\b(?i:answer(?:\s+is)?\s*:?){letter}", re.MULTILINE),
            re.compile(rf"\A\W*(?:({upper})(?:[).:*]|\s*\Z)|\(({either})\)|({either})\W*\Z)"),
            re.compile(rf"\(({either})\)"),
        ]

    def choice(self, text: str) -> str | None:
        """Return the letter that a text chooses, as a capital; None: it chooses none.

        Args:
            text: the response, without thoughts.
        """
        for form in self._forms:
            if matches := form.findall(text):
                last = matches[-1]
                return (last if isinstance(last, str) else "".join(last)).upper()
        return None

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [self._score(completion) for completion in completions]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        return [self._choice(completion) is not None for completion in completions]

    def answers(self, completions: Sequence[Completion]) -> list[str | None]:
        return [self._choice(completion) for completion in completions]

    def _choice(self, completion: Completion) -> str | None:
        return self.choice(after_thoughts(completion.text, completion.thinking) or "")

    def _score(self, completion: Completion) -> float | None:
        target = self._target.fullmatch(completion.target)
        return None if target is None else float(self._choice(completion) == target[1].upper())


class FormatMatch(Reward):
    r"""1 if the response has the form of a regular expression, else 0.

    The whole response is read, thoughts too. A dot also matches the end of a line. A match that
    takes longer than `seconds` fails: a pattern such as `(a+)+b` takes hours on some texts.

    Args:
        pattern: the regular expression, such as `<think>.*</think>\s*<answer>.*</answer>`.
        whole: the whole response must match; false: some part of it.
        seconds: most seconds for one response.
        weight: factor of this reward in the sum.

    Raises:
        UserError: the pattern is no regular expression.
    """

    def __init__(
        self, pattern: str, whole: bool = True, seconds: float = 1.0, weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        positive("FormatMatch", seconds=seconds)
        self.whole, self.seconds = whole, seconds
        try:
            self.pattern = regex.compile(pattern, regex.DOTALL)
        except (regex.error, TypeError) as error:
            raise UserError(
                f"`FormatMatch.pattern` must be a regular expression, got {pattern!r:.60}: {error}"
            ) from None

    def score(self, completions: Sequence[Completion]) -> list[float | RewardError | None]:
        return [self._score(completion.text) for completion in completions]

    def _score(self, text: str) -> float | RewardError:
        match = self.pattern.fullmatch if self.whole else self.pattern.search
        try:
            return float(match(text, timeout=self.seconds) is not None)
        except TimeoutError:
            return RewardError(
                f"`FormatMatch` took more than {self.seconds:g} seconds for {text[:40]!r}; use a "
                "pattern that does not repeat a repetition"
            )
