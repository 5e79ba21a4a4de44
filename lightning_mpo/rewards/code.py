"""A reward that runs programs on tests."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion, Reward
from lightning_mpo.rewards.programs import KINDS, code_of, job_of
from lightning_mpo.rewards.sandbox import Job, Limits, Pool, Result, strongest_level
from lightning_mpo.rewards.thoughts import after_thoughts

TRIAL = Job(("def f(x):\n    return x + 1",), tests=("assert f(1) == 2",), setup=("",))

ENDS = {
    "time": "took longer than `limits.seconds` or `limits.wall_seconds`",
    "memory": "used more than `limits.memory_mib`",
    "output": "wrote more than `limits.output_mib`",
    "crash": "ended before their tests did",
    "lost": "ended their sandbox, twice",
}


class CodeAnswer(Reward):
    """1 if the program in the response passes the tests of its row, else 0.

    The program is the last fenced Python block, or the response if it has no block. The columns of
    the row decide what is tested: `test` and `entry_point` as in HumanEval, where the program goes
    on from the column `prompt`; `test_list` as in MBPP; `inputs` and `outputs` for a program that
    reads standard input. Programs run in a sandbox (`docs/judging.md`). One that hangs, crashes or
    breaks a limit gets 0. A row whose tests cannot run is not judged.

    Args:
        partial: the share of tests that pass, instead of 1 for all; of `test`, of its assertions.
        require_finished: a response that was cut off gets 0.
        limits: of each program.
        allow_weak: accept a machine without bubblewrap, where programs have the rights of the user.
        workers: programs that run at the same time; None: as many as there are cores.
        language: of the programs; only Python.
        weight: factor of this reward in the sum.

    Raises:
        UserError: an option is out of range, or the language is not Python.
    """

    is_accuracy = True

    def __init__(
        self,
        partial: bool = False,
        require_finished: bool = True,
        limits: Limits | None = None,
        allow_weak: bool = False,
        workers: int | None = None,
        language: str = "python",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        at_least("CodeAnswer", 1, most=1024, workers=workers)
        if language != "python":
            raise UserError(f"`CodeAnswer.language` must be 'python', got {language!r}")
        self.partial, self.require_finished = partial, require_finished
        self.limits, self.allow_weak = limits or Limits(), allow_weak
        self.workers = workers or os.cpu_count() or 1
        self.ends: Counter[str] = Counter()
        """How many programs ended by each limit, by a crash, or by themselves (`exit`)."""
        self._pool: Pool | None = None
        self._results: dict[Job, Result] = {}

    def check(self, max_new_tokens: int) -> None:
        """Start the sandbox and run a program in it.

        Raises:
            UserError: programs cannot be isolated, or not run at all.
        """
        pool = self._ready()
        rank_zero_info(f"programs   isolated by {pool.level.name}")
        if not pool.run([TRIAL])[0].all_passed:
            raise UserError(
                "`CodeAnswer` cannot run programs here: a trial program does not pass; raise its "
                "`limits`, such as `memory_mib`"
            )

    def check_columns(self, columns: Sequence[str]) -> None:
        if not any(set(kind) <= set(columns) for kind in KINDS):
            kinds = ", or ".join(" and ".join(f"`{name}`" for name in kind) for kind in KINDS)
            raise UserError(
                f"`CodeAnswer` needs columns with tests: {kinds}; the data have "
                f"{', '.join(f'`{name}`' for name in columns) or 'none of their own'}"
            )

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [
            self._score(completion, result)
            for completion, result in zip(completions, self._judged(completions), strict=True)
        ]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        return [result is not None and result.compiled for result in self._judged(completions)]

    def _score(self, completion: Completion, result: Result | None) -> float | None:
        if job_of(completion.row, "", self.partial) is None:
            _warn("a row has no tests in the columns that `CodeAnswer` reads")
            return None
        if result is None or (self.require_finished and not completion.finished):
            return 0.0
        if result.broken:
            _warn(f"the tests of a row cannot run: {result.broken}")
            return None
        if result.end != "exit":
            return 0.0
        return result.passed / result.total if self.partial else float(result.all_passed)

    def _judged(self, completions: Sequence[Completion]) -> list[Result | None]:
        """Run each different program once; a second call for the same batch runs none."""
        jobs = [self._job(completion) for completion in completions]
        different = dict.fromkeys(job for job in jobs if job is not None)
        new = [job for job in different if job not in self._results]
        if new:
            done = self._ready().run(new)
            self._count([result.end for result in done])
            # outputs of a batch may be gigabytes
            results = {
                job: replace(result, output=b"") for job, result in zip(new, done, strict=True)
            }
            self._results = {job: results.get(job) or self._results[job] for job in different}
        return [None if job is None else self._results[job] for job in jobs]

    def _count(self, ends: Sequence[str]) -> None:
        """Count how programs ended, with a warning at the first of each kind."""
        for end in set(ends) - self.ends.keys() - {"exit"}:
            count = f"{ends.count(end)} of {len(ends)} programs"
            warnings.warn(f"`CodeAnswer`: {count} {ENDS[end]}; such programs get 0", stacklevel=2)
        self.ends.update(ends)

    def _job(self, completion: Completion) -> Job | None:
        code = code_of(after_thoughts(completion.text, completion.thinking) or "")
        if code is None:
            return None
        return job_of(completion.row, code, self.partial, completion.prompt)

    def _ready(self) -> Pool:
        if self._pool is None:
            level = strongest_level(self.allow_weak)
            self._pool = Pool(level, self.limits, self.workers)
        return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_pool": None, "_results": {}}


def _warn(line: str) -> None:
    warnings.warn(f"{line}; it is not judged", stacklevel=2)
