"""Mistakes of the user end in one line and exit code 2, whatever raised them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from jsonargparse import ArgumentError, set_parsing_settings
from lightning.pytorch.utilities import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from lightning_mpo.cli.messages import one_line
from lightning_mpo.cli.mistakes import explain
from lightning_mpo.cli.verbs import VERBS
from lightning_mpo.errors import UserError
from lightning_mpo.quiet import NOTES, leave_noise_out


def guarded(call: Callable[[], object]) -> int:
    """Call something that parses a command line; a mistake of the user's prints one line and returns 2, not 0."""
    leave_noise_out()
    set_parsing_settings(
        omegaconf_absolute_to_relative_paths=True
    )  # `${seed_everything}` under `fit` as well
    NOTES.hold()
    try:
        call()
    except UserError as error:
        NOTES.drop()
        return _fail_everywhere(error) if error.everywhere else _fail(str(error))
    except SystemExit as error:
        name = _exiting_module(error)
        if name is None:
            raise
        NOTES.drop()
        return _fail(
            f"module `{name}` cannot be imported: it calls `sys.exit` where it is imported; take that out"
        )
    except Exception as error:
        line = _mistake(error)
        if line is None:
            raise
        NOTES.drop()
        return _fail(line)
    finally:
        NOTES.show()
    return 0


def _fail_everywhere(error: UserError) -> int:
    """End this process of several, which all fail: the first prints, and ends before those that it started."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        return _fail(str(error))
    deadline = time.monotonic() + 60
    while error.launcher == os.getppid() and time.monotonic() < deadline:
        time.sleep(0.1)
    return 2


def _exiting_module(error: SystemExit) -> str | None:
    """Return the module whose import ended in `sys.exit`, if that is where an exit comes from."""
    name, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "<module>":
            name = str(trace.tb_frame.f_globals.get("__name__"))
        trace = trace.tb_next
    return name


def _mistake(error: Exception) -> str | None:
    """Return the line for a mistake of the user's; None for anything else."""
    if isinstance(error, ArgumentError):
        return one_line(str(error))
    if isinstance(error, OmegaConfBaseException):
        verb, _, key = str(error.full_key).partition(".")
        return f"`{key if verb in VERBS else error.full_key}`: {str(error.msg).splitlines()[0]}"
    return explain(error)


def _fail(message: str) -> int:
    print(f"lightning-mpo: {message}", file=sys.stderr)
    return 2
