"""Leaves out what other packages print and nobody can act on; warnings that say something about a run stay."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIPS = ("💡", "TPU available")
"""Lightning's advertisements, and a device that nothing here runs on."""
WARNINGS = (
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*dataloader is not resumable.*",  # ours keeps no position
    ".*Couldn't infer the batch indices.*",  # nobody asks for them
)
"""What Lightning warns of whatever is configured."""


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not any(tip in record.getMessage() for tip in TIPS)


def leave_tips_out() -> None:
    """Leave out Lightning's tips, and the warning that its own call of torch brings, from Python as well."""
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def leave_noise_out() -> None:
    """Leave out what a command line need not show, and show the package's warnings without a line of its code."""
    leave_tips_out()
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # misses an optional kernel, and works without
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not hasattr(warnings.formatwarning, "behind"):
        warnings.formatwarning = _plain(warnings.formatwarning)


def _plain(behind: Callable[..., str]) -> Callable[..., str]:
    """Return a format that writes warnings of this package as its other lines: a word, then what there is to say."""
    package = Path(__file__).parent

    def write(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if Path(filename).is_relative_to(package):
            return f"warning    {message}\n"
        return behind(message, category, filename, lineno, line)

    write.behind = behind  # type: ignore[attr-defined]
    return write


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Keep transformers from drawing bars, which run over those of a run."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
