"""The exception for a mistake that the user can correct. Its message is one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


class UserError(ValueError):
    """What is wrong, where, and what to write instead. The command line prints it without a traceback."""

    everywhere: bool = False
    """All processes of a run raise it at the same place, and the first one alone prints it."""
    launcher: int | None = None
    """Process that started this one and ends first: Lightning kills it, unread, where another one is gone before."""


def user_error(error: BaseException | None) -> UserError | None:
    """Return the `UserError` behind an exception: itself, its cause or its context; None: there is none."""
    if error is None or isinstance(error, UserError):
        return error
    return user_error(error.__cause__) or user_error(error.__context__)


def plainly(call: Callable[[], int]) -> int:
    """Call a verb that reads no configuration; a mistake of the user's prints one line and returns 2.

    Args:
        call: the verb, which returns its exit code.
    """
    try:
        return call()
    except UserError as error:
        line = str(error)
    except argparse.ArgumentError as error:
        line = " ".join(str(error).split())
    except OSError as error:
        if not error.filename:
            raise
        line = f"{str(error.filename)!r} cannot be used: {error.strerror}"
    print(f"lightning-mpo: {line}", file=sys.stderr)
    return 2
