"""Tells mistakes of the user from faults of the program.

A mistake gets one line, and a fault keeps its traceback.

The type of an exception does not tell them apart: a `ValueError` may be either. The place and the
time do. While options are parsed and objects are made from them, an exception of another library is
about an option. Once training runs, it is not. An exception of this package other than `UserError`
is a fault of the program at any time.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException
from yaml.representer import RepresenterError

from lightning_mpo.errors import UserError

_TRAINING = ("advance", "run_training_batch", "on_advance_end", "_evaluation_step", "_predict_step")
"""Functions of Lightning's loops. One of them is in the traceback of each error in a batch."""
_DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
"""Errors of files that a user can correct."""
_LIBRARIES = (
    *("lightning", "lightning_utilities", "lightning_fabric"),
    *("jsonargparse", "fsspec", "yaml", "omegaconf"),
)
"""Packages whose exceptions are about options while a run is set up."""


def explain(error: BaseException) -> str | None:
    """Return the line for a mistake of the user; None: another error."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    # the original exception, whatever the parser wrapped around it
    root = next((link for link in reversed(chain) if not _is_wrapper(link)), error)
    if isinstance(root, RecursionError | MemoryError | OmegaConfBaseException):
        return None
    line = _environment_mistake(root)
    if line is not None:
        return line
    # errors of other packages: about an option, unless training runs
    raised_in = _raised_in(root)
    package = raised_in.split(".")[0]
    if isinstance(root, MisconfigurationException):
        return _line(root)
    if any(name in _TRAINING for link in chain for _, name in _frames(link)):
        plugins = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers")
        return _line(root) if raised_in.startswith(plugins) else None
    if package == "lightning_mpo":
        return None
    is_about_options = _while_objects_are_built(chain) or package in _LIBRARIES
    return _line(root) if is_about_options else None


def _environment_mistake(error: BaseException) -> str | None:
    """Return the line for a missing package, an unusable file, or a value that YAML cannot hold."""
    if isinstance(error, ImportError):
        return _missing_package(error)
    if isinstance(error, RepresenterError):
        return (
            f"the configuration holds {error.args[-1]!r}, which is not text: write it out, such as "
            "`interval: step` of `Timer`"
        )
    if isinstance(error, OSError) and error.filename and error.errno in _DISK:
        return f"{str(error.filename)!r} cannot be used: {error.strerror}"
    return None


def _while_objects_are_built(chain: list[BaseException]) -> bool:
    """Return whether the parser was reading options or building objects from them."""
    frames = [frame for link in chain for frame in _frames(link)]
    runs = any(name == "_run_subcommand" for _, name in frames)
    return ("lightning.pytorch.cli", "__init__") in frames and not runs


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its cause, the cause of that, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_wrapper(error: BaseException) -> bool:
    """Return whether the parser has put its own report around the error of a constructor."""
    return "Given value" in str(error) or "Parser key" in str(error)


def _frames(error: BaseException) -> list[tuple[str, str]]:
    """Return module and function of each frame, innermost last."""
    return [
        (str(frame.f_globals.get("__name__", "")), frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]


def _raised_in(error: BaseException) -> str:
    """Return the module that raised; modules of Python's library are passed over."""
    for module, _ in reversed(_frames(error)):
        if module.split(".")[0] not in sys.stdlib_module_names:
            return module
    return ""


def _missing_package(error: ImportError) -> str | None:
    """Return the line for a package or a module that is not installed; None: another error."""
    text = " ".join(str(error).split())
    match = re.search(r"Requirement '(([\w.-]+)[^']*)' not met", text) or re.search(
        r"pip install (?:-U )?'?(([\w.-]+)(?:[<>=!~][\w.,<>=!~]+)?)", text
    )
    if match:
        return (
            f"the package `{match[2]}` is not installed, and the configuration needs it: "
            f"pip install '{match[1]}'"
        )
    if error.name:
        return f"no module `{error.name}`: it must be installed, or lie in the working folder"
    return None


def _line(error: BaseException) -> str:
    """Return the message in one line, with the type of the exception if the message is short."""
    text = " ".join(str(error).split())
    text = re.sub(
        r"<([\w.]+) object at 0x[0-9a-f]+>", lambda match: match[1].rsplit(".", 1)[-1], text
    )
    text = text if len(text) > 25 else f"{type(error).__name__}: {text}"
    return text if len(text) < 400 else f"{text[:400]} …"
