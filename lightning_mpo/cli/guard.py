"""Mistakes of the user end in one line and exit code 2, whatever raised them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from lightning.pytorch.utilities import rank_zero_only

from lightning_mpo.cli.messages import parser_mistake
from lightning_mpo.cli.mistakes import explain
from lightning_mpo.errors import UserError, print_mistake
from lightning_mpo.quiet import NOTES, leave_noise_out


def guarded(call: Callable[[], object]) -> int:
    """Call a function that parses a command line.

    Returns:
        The exit code: 0, or 2 after a mistake of the user, for which one line is printed.
    """
    leave_noise_out()
    NOTES.hold()
    try:
        call()
    except UserError as error:
        NOTES.drop()
        return _fail_everywhere(error) if error.everywhere else print_mistake(str(error))
    except SystemExit as error:
        # a module of the user that exits where it is imported
        name = _exiting_module(error)
        if name is None:
            raise
        NOTES.drop()
        return print_mistake(
            f"module `{name}` cannot be imported: it calls `sys.exit` where it is imported; take "
            "that out"
        )
    except Exception as error:
        # a mistake that another package found, or a fault of the program
        line = parser_mistake(error) or explain(error)
        if line is None:
            raise
        NOTES.drop()
        return print_mistake(line)
    finally:
        NOTES.show()
    return 0


def _fail_everywhere(error: UserError) -> int:
    """End one of several processes that all fail: the first prints, and the others wait for it."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        return print_mistake(str(error))
    deadline = time.monotonic() + 60
    while error.launcher == os.getppid() and time.monotonic() < deadline:
        time.sleep(0.1)
    return 2


def _exiting_module(error: SystemExit) -> str | None:
    """Return the module whose import ended in `sys.exit`; None: the exit comes from elsewhere."""
    name, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "<module>":
            name = str(trace.tb_frame.f_globals.get("__name__"))
        trace = trace.tb_next
    return name
