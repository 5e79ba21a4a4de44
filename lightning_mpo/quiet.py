"""Filters messages of other packages that need no action; warnings about a run stay."""

from __future__ import annotations

import atexit
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIPS = ("💡", "TPU available")
"""Parts of Lightning's advertisements, and of its line on a device that is not supported here."""
WARNINGS = (
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*dataloader is not resumable.*",  # ours has no position to save
    ".*Couldn't infer the batch indices.*",  # no code here uses them
)
"""Warnings of Lightning that come with every configuration."""


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not any(tip in record.getMessage() for tip in TIPS)


def leave_tips_out() -> None:
    """Filter Lightning's tips, and a warning of torch that Lightning causes. Runs from Python use
    this too.
    """
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    for package in (
        "lightning.pytorch",
        "pytorch_lightning",
    ):  # whichever is imported last logs for both
        logging.getLogger(f"{package}.utilities.rank_zero").addFilter(_is_no_tip)


def leave_noise_out() -> None:
    """Filter noise on the command line, and show this package's warnings without the line of
    code.
    """
    leave_tips_out()
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    _write_above_bars()
    # it reports a missing optional kernel, and works without it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not hasattr(warnings.formatwarning, "behind"):
        warnings.formatwarning = _plain(warnings.formatwarning)


class _Stderr:
    """Stands for `sys.stderr` of the moment: a progress bar puts its own there, which writes above
    it.
    """

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _write_above_bars() -> None:
    """Let Lightning's handlers, which keep the stream of their making, write to that of the
    moment.
    """
    for package in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(package).handlers:
            if type(handler) is logging.StreamHandler and not isinstance(handler.stream, _Stderr):
                handler.setStream(_Stderr())


def _plain(behind: Callable[..., str]) -> Callable[..., str]:
    """Return a format that writes warnings of this package like its other lines: a word, then the
    message.
    """
    package = Path(__file__).parent

    def write(
        message: Any, category: Any, filename: str, lineno: int, line: str | None = None
    ) -> str:
        if Path(filename).is_relative_to(package):
            return f"warning    {message}\n"
        return behind(message, category, filename, lineno, line)

    write.behind = behind  # type: ignore[attr-defined]
    return write


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars, which would overwrite those of a run."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class Notes:
    """What libraries say of a run before it begins: held back, so that a refused command says why
    and nothing else.

    Records of `logging` and warnings are kept in their order. Errors are shown at once.
    """

    def __init__(self) -> None:
        self._notes: list[Callable[[], object]] = []
        self._handlers: list[logging.Handler] = []
        self._warn: Any = None

    @property
    def holding(self) -> bool:
        """Whether notes are held back."""
        return self._warn is not None

    def hold(self) -> None:
        """Hold notes back until `show` or `drop`, at the latest until the process ends."""
        if self.holding:
            return
        atexit.register(self.show)
        loggers = [
            logger
            for logger in logging.root.manager.loggerDict.values()
            if isinstance(logger, logging.Logger)
        ]
        handlers = [handler for logger in (logging.root, *loggers) for handler in logger.handlers]
        self._handlers = [
            handler for handler in (*handlers, logging.lastResort) if handler is not None
        ]
        for handler in self._handlers:
            handler.addFilter(_Held(self._notes, handler))
        self._warn = warnings.showwarning

        def keep(*what: Any, **options: Any) -> None:
            self._notes.append(lambda: warn(*what, **options))

        warn, warnings.showwarning = self._warn, keep

    def show(self) -> None:
        """Show what was held back, and all that follows."""
        notes = self._let_go()
        for note in notes:
            note()

    def drop(self) -> None:
        """Forget what was held back; what follows is shown."""
        self._let_go()

    def _let_go(self) -> list[Callable[[], object]]:
        if not self.holding:
            return []
        atexit.unregister(self.show)
        for handler in self._handlers:
            for held in [known for known in handler.filters if isinstance(known, _Held)]:
                handler.removeFilter(held)
        warnings.showwarning, self._warn = self._warn, None
        notes, self._notes, self._handlers = self._notes, [], []
        return notes


class _Held(logging.Filter):
    """Keeps a handler's records below errors."""

    def __init__(self, notes: list[Callable[[], object]], handler: logging.Handler) -> None:
        super().__init__()
        self.notes, self.handler = notes, handler

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        self.notes.append(lambda: self.handler.handle(record))
        return False


NOTES = Notes()
"""Of this process."""
