"""The helper process of `MathAnswer`: a script, started by path, that knows math-verify and nothing of this package.

Reads one JSON object a line (`text`, `target`, `seconds`) and answers each with one line (`judged`: the target could be
read; `answered`: the response could; `correct`); `null` asks whether it is there. A question that takes more than
`seconds` of CPU time ends the process: the timer's signal keeps its default action, which also stops C code that no
Python exception could interrupt.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MEMORY = 4 * 2**30
CONFIG = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

# math-verify makes a set of all boxes; only those are one answer that "and", "or" or a comma joins.
GOES_ON = re.compile(r"\{[^\n]*\}\s*\$?\s*(,|,?\s*and|,?\s*or)\s*\$?\s*")


def read(text: str) -> list[Any]:
    """Parse the last answer of a text: `\\boxed{...}`, else what follows the last `####`, else math-verify's choice."""
    text = text.replace("\u2212", "-")
    _, *boxes = text.split("\\boxed")
    if boxes:
        first = len(boxes) - 1
        while first > 0 and GOES_ON.fullmatch(boxes[first - 1]):
            first -= 1
        text = "".join("\\boxed" + box for box in boxes[first:])
    else:
        text = text.rpartition("####")[2]
    return parse(text, CONFIG, parsing_timeout=None)


@lru_cache(maxsize=4096)
def read_target(target: str) -> list[Any]:
    """Parse a target, which may be bare LaTeX such as `\\frac{1}{2}`."""
    marked = any(mark in target for mark in ("\\boxed", "$", "####"))
    return read(target if marked else f"\\boxed{{{target}}}") or read(target)


def judge(text: str, target: str) -> dict[str, bool]:
    """Compare a response with its target."""
    gold, answer = read_target(target), read(text)
    correct = bool(gold and answer) and verify(gold, answer, timeout_seconds=None)
    return {"judged": bool(gold), "answered": bool(answer), "correct": correct}


def main() -> None:
    """Answer until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin:
        question = json.loads(line)
        verdict = None
        if question is not None:
            signal.setitimer(signal.ITIMER_PROF, question["seconds"])
            verdict = judge(question["text"], question["target"])
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
