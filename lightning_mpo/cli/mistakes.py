"""Tells mistakes of the user's, which get one line, from faults of the program, which keep their traceback.

The kind of an exception does not tell them apart: a `ValueError` may be either. What tells is where it was raised, and
when. While options are parsed and objects made from them, whatever other libraries raise is about an option. Once
training runs it is not. What this package raises without meaning to is a fault of its own at any time.
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
"""Functions of Lightning's loops that stand in the traceback of whatever is raised once batches are run."""
_DISK = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)
_LIBRARIES = (
    "lightning",
    "lightning_utilities",
    "lightning_fabric",
    "jsonargparse",
    "fsspec",
    "yaml",
    "omegaconf",
)
"""Whose exceptions are about options while a run is set up."""


def explain(error: BaseException) -> str | None:
    """Return the line for a mistake of the user's; None for anything else."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    root = next((link for link in reversed(chain) if not _is_wrapper(link)), error)
    if isinstance(root, RecursionError | MemoryError):
        return None
    if isinstance(root, OmegaConfBaseException):
        return None
    if isinstance(root, ImportError):
        missing = _missing_package(root)
        if missing:
            return missing
    if isinstance(root, RepresenterError):
        return f"the configuration holds {root.args[-1]!r}, which is no text: write it out, such as `interval: step` of `Timer`"
    if isinstance(root, OSError) and root.filename and root.errno in _DISK:
        return f"{str(root.filename)!r} cannot be used: {root.strerror}"
    training = any(name in _TRAINING for link in chain for _, name in _frames(link))
    where = _raised_in(root)
    if isinstance(root, MisconfigurationException):
        return _line(root)
    if training:
        return (
            _line(root)
            if where.startswith(("lightning.pytorch.callbacks", "lightning.pytorch.loggers"))
            else None
        )
    if where.split(".")[0] == "lightning_mpo":
        return None
    frames = [frame for link in chain for frame in _frames(link)]
    if ("lightning.pytorch.cli", "__init__") in frames and not any(
        name == "_run_subcommand" for _, name in frames
    ):
        return _line(root)
    return _line(root) if where.split(".")[0] in _LIBRARIES else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from, or while which it was raised."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_wrapper(error: BaseException) -> bool:
    """Whether the parser has put its own report around what a constructor raised."""
    return "Given value" in str(error) or "Parser key" in str(error)


def _frames(error: BaseException) -> list[tuple[str, str]]:
    """Return module and function of each frame, innermost last."""
    return [
        (str(frame.f_globals.get("__name__", "")), frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]


def _raised_in(error: BaseException) -> str:
    """Return the module that raised, calls into Python's own library left out."""
    for module, _ in reversed(_frames(error)):
        if module.split(".")[0] not in sys.stdlib_module_names:
            return module
    return ""


def _missing_package(error: ImportError) -> str | None:
    text = " ".join(str(error).split())
    match = re.search(r"Requirement '(([\w.-]+)[^']*)' not met", text) or re.search(
        r"pip install (?:-U )?'?(([\w.-]+)(?:[<>=!~][\w.,<>=!~]+)?)", text
    )
    if match:
        return f"the package `{match[2]}` is not installed, and the configuration needs it: pip install '{match[1]}'"
    return (
        f"no module `{error.name}`: it must be installed, or lie in the working folder"
        if error.name
        else None
    )


def _line(error: BaseException) -> str:
    """Return the message in one line, with the type where it says little."""
    text = " ".join(str(error).split())
    text = re.sub(
        r"<([\w.]+) object at 0x[0-9a-f]+>", lambda found: found.group(1).rsplit(".", 1)[-1], text
    )
    text = text if len(text) > 25 else f"{type(error).__name__}: {text}"
    return text if len(text) < 400 else f"{text[:400]} …"
