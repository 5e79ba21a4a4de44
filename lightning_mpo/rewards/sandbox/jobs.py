"""A program with its tests, and the result."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """One run of a program.

    Args:
        sources: alternatives of its text; the first that Python can compile runs.
        cases: pairs of standard input and the output that is right. The program runs once for each.
        tests: code that calls functions of the program; without `cases`.
        setup: alternatives of code that runs before the tests, among the tests.
        entry: name of the tested function; None: the tests show it.
        each: assertions, or cases, count one by one. Else the first that fails ends the job.
    """

    sources: tuple[str, ...]
    cases: tuple[tuple[str, str], ...] = ()
    tests: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    entry: str | None = None
    each: bool = False


@dataclass(frozen=True)
class Result:
    """The end of a run.

    Args:
        end: `exit`; `time`, `memory`, `output`: the limit that it broke; `crash`: it ended before
            its tests did; `lost`: its sandbox ended.
        compiled: the text is a program.
        passed: tests that passed, or assertions.
        total: tests that ran, or assertions.
        output: standard output of a script.
        status: exit code of a script; negative: the signal that ended it.
        broken: why the tests cannot run, with any program; empty: they can.
    """

    end: str
    compiled: bool = False
    passed: int = 0
    total: int = 1
    output: bytes = field(default=b"", repr=False)
    status: int = 0
    broken: str = ""

    @property
    def all_passed(self) -> bool:
        """Whether the program kept its limits and passed all tests."""
        return self.end == "exit" and not self.broken and 0 < self.passed == self.total


def same_output(output: bytes, right: str) -> bool:
    """Return whether two texts have the same words in each line.

    Example:
        >>> same_output(b"1  2 \\n3\\n", "1 2\\n3"), same_output(b"1 2 3", "1 2\\n3")
        (True, False)
    """
    texts = (output.decode("utf-8", "surrogateescape"), right)
    first, second = ([line.split() for line in text.strip().splitlines()] for text in texts)
    return first == second
