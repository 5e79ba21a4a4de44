"""The worker process of `MathAnswer`, a script that imports math-verify.

It is started by path and imports nothing of this package.

It reads one JSON object a line (`text`, `target`, `extract`, `seconds`, `memory`) and answers with
one line: `judged`, the target could be read; `answered`, the response could be read; `correct`; and
`answer`, its text. The line `null` tests whether the process is alive. A question that takes more
than `seconds` of CPU time, or more than `memory` bytes, ends the process. The signal of the timer
keeps its default action, which also stops C code that no Python exception could interrupt.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
import unicodedata
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, grader, parse, verify
from sympy import Float, MatrixBase, Rational

CONFIG = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

# math-verify takes a set of all boxes; they are one answer only if joined by "and", "or" or a comma
GOES_ON = re.compile(r"\{[^\n]*\}\s*\$?\s*(,|,?\s*and|,?\s*or)\s*\$?\s*")

DASHES = dict.fromkeys(map(ord, "\u2212\u2012\u2013\u2010\u2011\ufe63\uff0d"), "-")
SIGNS = {
    0x66B: ".",
    0x66C: ",",
    0xFF0E: ".",
    0xFF0C: ",",
    0xFF05: "%",
    0x20AC: "",
    0xA3: "",
    0xA5: "",
    0xB0: "^\\circ ",
    0x7E: " ",
} | dict.fromkeys(
    [*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF], ""
)
SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789"
)

THOUSANDS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
DRESS = [
    (r"\\\$", ""),
    (r"\\(?:framebox|fbox)(?=\s*\{)", r"\\boxed"),
    (r"\\boxed\s*(-?\d[\d.,]*)", r"\\boxed{\1}"),
    (r"\\(?:text)?color\{[^{}]*\}", ""),
    (r"\\(?:underline|mathbf|boldsymbol|bm)\{([^{}]*[\d=][^{}]*)\}", r"\1"),
    (r"\\text\{[^{}\d]*:\s*\}", ""),
    (r"\\text\{\s*(-?\d[\d.,/]*)(\s[^{}\d]*)\}", r"\1\\text{\2}"),
    (r"(?<=\d)(?:\\[ ,;!]|\s)*\(\\text\{[A-Za-z -]+\}\)", ""),
    (r"\{:\}", ":"),
    (r"(?<!\w)__([^_\n]+)__(?!\w)", r"\1"),
    (r"(?<![\w*)\]}])\*([^*\s](?:[^*\n]*[^*\s])?)\*(?![\w*(\[{])", r"\1"),
    (r"`+", " "),
    (r"(?<![\\A-Za-z])sqrt\(([^()]{1,80})\)", r"\\sqrt{\1}"),
    (r"((?:^|[:=({\[$]|\bis)[ \t]*)-[ \t]+(?=\d)", r"\1-"),
]
"""Decorations of answers: emphasis, colours, units inside a box, a minus that stands apart."""


def clean(text: str) -> str:
    """Rewrite numbers in ASCII and in forms that math-verify reads."""
    text = text.translate(DASHES | SIGNS)
    for pattern, plain in DRESS:
        text = re.sub(pattern, plain, text)
    text = re.sub(r"(?<![\d.])(\d{0,20})\.(\d{0,20})\\overline\{(\d{1,20})\}", _repeating, text)
    text = re.sub(r"(?<=\d)(?:\\[,!;: ]|[\u202f\u2009\u00a0])(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"[\u00a0\u2000-\u200a\u202f\u3000]", " ", text).replace("\r\n", "\n")
    text = re.sub(
        r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+",
        lambda m: f"^{{{m[0].translate(SUPERSCRIPTS)}}}",
        text,
    )
    text = re.sub(r"[\u00bc-\u00be\u2150-\u215e]", _vulgar, text)
    text = re.sub(r"\d", lambda m: str(unicodedata.digit(m[0])), text)
    text = re.sub(r"\u221a\s*(\d+|\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\w.])(\d{1,40}(?:\.\d{1,40})?)[eE]([+-]?\d{1,2})(?!\w)", _scientific, text)
    text = re.sub(r"(?<![\w.^/}\\])(\d{1,9})\s+(\d{1,9})/(\d{1,9})(?![\d/])", _mixed, text)
    text = re.sub(r"(?<![\w.])(\d{1,400})_(?:\{(\d{1,2})\}|(\d{1,2}))(?!\w)", _based, text)
    text = re.sub(r"(?<=\d)[.,;](?=\s*(\}|$))", "", text)
    return re.sub(r"(^|\{|\$)\s*\+(?=\s*\d)", r"\1", text)


def _vulgar(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return f" {top}/{bottom}" if bottom else match[0]


def _scientific(match: re.Match[str]) -> str:
    return f"{Decimal(match[0]):f}"


def _repeating(match: re.Match[str]) -> str:
    whole, start, period = match[1] or "0", match[2], match[3]
    top = int(whole + start + period) - int(whole + start)
    return f"{top}/{10 ** len(start) * (10 ** len(period) - 1)}"


def _mixed(match: re.Match[str]) -> str:
    whole, top, bottom = map(int, match.groups())
    return f"{whole * bottom + top}/{bottom}" if top < bottom else match[0]


def _based(match: re.Match[str]) -> str:
    base = int(match[2] or match[3])
    try:
        return str(int(match[1], base)) if 2 <= base <= 36 else match[0]
    except ValueError:
        return match[0]


PERCENT = re.compile(rf"({THOUSANDS})\s*(?:\\?%|percent\b)")


def forms(text: str) -> list[str]:
    """Return the readings of a text with a percentage: the number, and the number over 100."""
    if not PERCENT.search(text):
        return [text]
    return [
        PERCENT.sub(r"\1", text),
        PERCENT.sub(lambda m: f"{Decimal(m[1].replace(',', '')) / 100:f}", text),
    ]


def same_number(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Compare two numbers exactly.

    A decimal equals a number without a finite decimal form if six significant digits agree.
    """
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase) or not (_is_real(a) and _is_real(b)):
        return bool(_numeric_eq(a, b, float_rounding, numeric_precision))
    a, b = grader.safe_sympy_doit(a), grader.safe_sympy_doit(b)
    exact = [Rational(str(x)) if isinstance(x, Float) else x for x in (a, b)]
    if exact[0] == exact[1]:
        return True
    decimal = a.has(Float) or b.has(Float)
    if decimal and not all(_terminates(x) for x in exact):
        return str(a.evalf(6)) == str(b.evalf(6))
    if all(isinstance(x, Rational) for x in exact):
        return False
    return bool(abs((exact[0] - exact[1]).evalf(40)) <= abs(exact[0].evalf(40)) / 10**25)


def _is_real(x: Any) -> bool:
    return bool(
        getattr(x, "is_number", False)
        and getattr(x, "is_extended_real", False)
        and x.is_finite is not False
    )


def _terminates(x: Any) -> bool:
    """Return whether a number has a finite decimal form."""
    if not isinstance(x, Rational):
        return False
    rest = int(x.q)
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


_numeric_eq = grader.sympy_numeric_eq
grader.sympy_numeric_eq = same_number


TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
LETTER = re.compile(
    r"(?:answer(?:\s+is)?\s*:?|####)\W*(?:\\text\w*\W*)?\b([A-Z])\b\s*(?:[).:*]|$)",
    re.IGNORECASE | re.MULTILINE,
)


def read(text: str) -> list[Any]:
    """Parse the last answer of a text.

    It is the content of `<answer>`, and in it the last `\\boxed{...}`, else the text after the last
    `####`, else the letter in "the answer is C", else math-verify's choice.
    """
    text = (TAGGED.findall(text) or [text])[-1]
    _, *boxes = text.split("\\boxed")
    if boxes:
        first = len(boxes) - 1
        while first > 0 and GOES_ON.fullmatch(boxes[first - 1]):
            first -= 1
        text = "".join("\\boxed" + box for box in boxes[first:])
    else:
        letters = LETTER.findall(text)
        if letters and letters[-1].isupper():
            return parse(f"\\boxed{{{letters[-1]}}}", CONFIG, parsing_timeout=None)
        text = text.rpartition("####")[2]
    return parse(text, CONFIG, parsing_timeout=None)


@lru_cache(maxsize=4096)
def read_target(target: str) -> list[Any]:
    """Parse a target, which may be bare LaTeX such as `\\frac{1}{2}`."""
    marked = any(mark in target for mark in ("\\boxed", "$", "####"))
    return read(target if marked else f"\\boxed{{{target}}}") or read(target)


DATE = re.compile(r"(?<!\d)(?:\d{4}[-/]\d{1,2}[-/]\d{1,2}|\d{1,2}[-/]\d{1,2}[-/]\d{4})(?!\d)")


def _numbers(date: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", date)]


NUMBER = re.compile(rf"-?(?:{THOUSANDS}|\.\d+)(?:/\d+)?(?:\s*\\?%)?")


def part(text: str, extract: str) -> str:
    """Return the part of a text that may hold the answer; empty: there is no such part.

    `extract` is auto (the whole text), boxed, tagged (the last `<answer>`), hashes (behind the last
    `####`) or number (the last one).
    """
    if extract == "boxed":
        return re.sub(r"</?answer>", " ", text) if "\\boxed" in text else ""
    if extract == "tagged":
        return (TAGGED.findall(text) or [""])[-1]
    if extract == "hashes":
        return text.rpartition("####")[2] if "####" in text else ""
    if extract == "number":
        numbers = NUMBER.findall(text)
        return f"\\boxed{{{numbers[-1]}}}" if numbers else ""
    return text


def spell(answer: list[Any]) -> str | None:
    """Return a parsed answer as text, a plain number as a fraction; None: there is none.

    An expression is not evaluated, as that may take for ever.
    """
    if not answer:
        return None
    text = str(answer[-1] if isinstance(answer[-1], str) else "?").strip()[:200]
    plain = re.fullmatch(rf"-?(?:{THOUSANDS}|\.\d+)", text)
    return str(Fraction(text.replace(",", ""))) if plain else text


def judge(text: str, target: str, extract: str = "auto") -> dict[str, bool | str | None]:
    """Compare a response with its target."""
    text = part(clean(text), extract)
    if DATE.fullmatch(target.strip()):  # no difference of numbers
        dates = DATE.findall(text)
        right = bool(dates) and _numbers(dates[-1]) == _numbers(target)
        return _verdict(True, dates or read(text), right)
    targets, texts = forms(clean(target.strip())), forms(text)
    golds, answers = [read_target(form) for form in targets], [read(form) for form in texts]
    if len(golds) == len(answers) == 2:  # both are percentages
        golds, answers = golds[:1], answers[:1]
    pairs = [(gold, answer) for gold in golds for answer in answers if gold and answer]
    correct = any(verify(gold, answer, timeout_seconds=None) for gold, answer in pairs)
    return _verdict(bool(golds[0]), answers[0], correct)


def _verdict(judged: bool, answer: list[Any], correct: bool) -> dict[str, bool | str | None]:
    return {
        "judged": judged,
        "answered": bool(answer),
        "correct": correct,
        "answer": spell(answer),
    }


def main() -> None:
    """Answer until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    logging.disable()
    hardest = resource.getrlimit(resource.RLIMIT_AS)[1]
    for line in sys.stdin:
        question = json.loads(line)
        verdict = None
        if question is not None:
            seconds, memory = question.pop("seconds"), question.pop("memory")
            most = memory if hardest == resource.RLIM_INFINITY else min(memory, hardest)
            resource.setrlimit(resource.RLIMIT_AS, (most, hardest))
            signal.setitimer(signal.ITIMER_PROF, seconds)
            verdict = judge(**question)
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
