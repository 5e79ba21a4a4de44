"""The exception for a mistake that the user can correct. Its message is one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake of the user: what is wrong, where, and what to write instead.

    The command line prints the message without a traceback.
    """

    everywhere: bool = False
    """All processes of a run raise it at the same place, and only the first one prints it."""
    launcher: int | None = None
    """Id of the process that started this one. This process waits for its end, as it would
    otherwise be killed before the other one has printed.
    """


def user_error(error: BaseException | None) -> UserError | None:
    """Return the `UserError` behind an exception: itself, its cause or its context."""
    if error is None or isinstance(error, UserError):
        return error
    return user_error(error.__cause__) or user_error(error.__context__)


def exit_code_of(verb: Callable[[], int]) -> int:
    """Call a verb that reads no configuration.

    Args:
        verb: returns its exit code.

    Returns:
        The exit code; 2 after a mistake of the user, for which one line is printed.
    """
    try:
        return verb()
    except UserError as error:
        line = str(error)
    except argparse.ArgumentError as error:
        line = " ".join(str(error).split())
    except OSError as error:
        if not error.filename:
            raise
        line = f"{str(error.filename)!r} cannot be used: {error.strerror}"
    return print_mistake(line)


def print_mistake(message: str) -> int:
    """Print a mistake of the user; return the exit code for it."""
    print(f"lightning-mpo: {message}", file=sys.stderr)
    return 2
