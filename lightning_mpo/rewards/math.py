"""A reward that compares mathematical expressions, not strings."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from lightning_mpo.checks import at_least, one_of, positive, within
from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion, Reward
from lightning_mpo.rewards.thoughts import after_thoughts


class MathAnswer(Reward):
    r"""1 if the last answer in the response equals the target as a mathematical expression, else 0.

    The answer is the first of these that the response has: the last `<answer>`, the last
    `\boxed{...}` (several, if "and" joins them), the text after the last `####`, the words after
    "the answer is", the last expression or number. After thoughts, only the text behind `</think>`
    is read. 51, 51.0, \$51 and 102/2 are equal, and so are 1,000 and 1000. `docs/judging.md` has
    the rules.

    math-verify parses and compares the answers. It can hang or take all memory on an untrusted
    response (`9^9^9^9`), so it runs in helper processes with limits. A response that exceeds them
    counts as not answered.

    Args:
        require_finished: a response that was cut off gets 0, as its last number is often an
            accident.
        extract: "auto" takes the first of these places that the response has. "boxed", "tagged"
            (`<answer>`), "hashes" (`####`) and "number" (the last one) take the answer from this
            place alone; a response without it is not answered.
        seconds: CPU time for one response.
        memory: most memory of a helper process, GiB.
        workers: responses that are judged at the same time, each in a process of its own.
        weight: factor of this reward in the sum.

    Raises:
        UserError: an option is out of range.
    """

    is_accuracy = True

    def __init__(
        self,
        require_finished: bool = True,
        extract: Literal["auto", "boxed", "tagged", "hashes", "number"] = "auto",
        seconds: float = 3.0,
        memory: float = 4.0,
        workers: int = 2,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        one_of("MathAnswer", ("auto", "boxed", "tagged", "hashes", "number"), extract=extract)
        positive("MathAnswer", most=86_400, seconds=seconds)
        within("MathAnswer", "[1, 1024]", memory=memory)
        at_least("MathAnswer", 1, most=1024, workers=workers)
        self.require_finished, self.extract = require_finished, extract
        self.seconds, self.memory, self.workers = seconds, memory, workers

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        verdicts = self._verdicts(completions)
        return [self._score(c, v) for c, v in zip(completions, verdicts, strict=True)]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        return [verdict.answered for verdict in self._verdicts(completions)]

    def answers(self, completions: Sequence[Completion]) -> list[str | None]:
        return [verdict.answer for verdict in self._verdicts(completions)]

    def _verdicts(self, completions: Sequence[Completion]) -> list[_Verdict]:
        questions = [
            _Question(
                after_thoughts(completion.text, completion.thinking) or "",
                completion.target,
                self.extract,
                self.seconds,
                int(self.memory * 2**30),
            )
            for completion in completions
        ]
        with ThreadPoolExecutor(self.workers) as threads:
            distinct = list(dict.fromkeys(questions))
            verdicts = dict(zip(distinct, threads.map(_judge, distinct), strict=True))
        return [verdicts[question] for question in questions]

    def _score(self, completion: Completion, verdict: _Verdict) -> float | None:
        if not verdict.judged:
            _warn_of_target(completion.target)
            return None
        return float(verdict.correct and (completion.finished or not self.require_finished))


class _Verdict(NamedTuple):
    judged: bool
    answered: bool
    correct: bool
    answer: str | None = None


class _Question(NamedTuple):
    text: str
    target: str
    extract: str
    seconds: float
    memory: int  # bytes


class _Helper:
    """The process that runs `math_worker.py`, one question at a time.

    It starts at the first question, and again after its end or a fork.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, question: _Question) -> _Verdict:
        """Judge one response. If it ends the process by a limit or a crash, it is not answered.

        Raises:
            UserError: the process cannot be started.
        """
        if self._process is None or self._owner != os.getpid():
            self._process, self._owner = _start(), os.getpid()
        reply = _exchange(self._process, json.dumps(question._asdict()))
        if reply:
            return _Verdict(**json.loads(reply))
        self.close()
        return _Verdict(judged=True, answered=False, correct=False)

    def close(self) -> None:
        """End the process by ending its input."""
        if self._process is not None and self._owner == os.getpid():
            try:
                self._process.communicate(timeout=5)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                self._process.kill()
                self._process.wait()
        self._process = None


class _Pool:
    """Helpers; a new one is made if all others are busy."""

    def __init__(self) -> None:
        self.idle: list[_Helper] = []

    def ask(self, question: _Question) -> _Verdict:
        """Judge one response by a helper that has no other question."""
        try:
            helper = self.idle.pop()
        except IndexError:
            helper = _Helper()
        try:
            return helper.ask(question)
        finally:
            self.idle.append(helper)

    def close(self) -> None:
        """End the processes."""
        for helper in self.idle:
            helper.close()


def _start() -> subprocess.Popen[str]:
    # -P: this folder has a math.py; a session of its own: signals to our group are not for it
    process = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    if not _exchange(process, "null"):
        process.kill()
        raise UserError(
            f"the helper process of `MathAnswer` does not start (exit status {process.wait()}); "
            f"`{sys.executable} -P {_WORKER}` shows why"
        )
    return process


def _exchange(process: subprocess.Popen[str], line: str) -> str:
    """Write a line to the process and return its answer; empty: the process has ended."""
    if process.stdin is None or process.stdout is None:
        return ""
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""


_WORKER = Path(__file__).with_name("math_worker.py")
_pool = _Pool()
atexit.register(lambda: _pool.close())


@lru_cache(maxsize=8192)
def _judge(question: _Question) -> _Verdict:
    """Ask once per (response, target): `score`, `answered` and `answers` share the verdict."""
    return _pool.ask(question)


@lru_cache(maxsize=1024)
def _warn_of_target(target: str) -> None:
    warnings.warn(
        f"`MathAnswer` cannot read the target {target[:60]!r}; its rows are not judged",
        stacklevel=2,
    )
