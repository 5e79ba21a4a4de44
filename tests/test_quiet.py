"""What others print and nobody can act on is left out; what says something about a run is not."""

from __future__ import annotations

import io
import logging
import sys
import warnings

import pytest
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

import lightning_mpo.modules  # noqa: F401  leaves tips out
from lightning_mpo import quiet
from lightning_mpo.cli.guard import guarded
from lightning_mpo.errors import UserError


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with warnings.catch_warnings():
        yield


def test_lightnings_tips_are_left_out_from_python_too(caplog):
    caplog.set_level(
        logging.INFO, logger="pytorch_lightning.utilities.rank_zero"
    )  # another test may import it
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        rank_zero_info("💡 Tip: for seamless cloud uploads, install litmodels")
        rank_zero_info("TPU available: False, using: 0 TPU cores")
        rank_zero_info("rollout    4 prompts")
    assert [record.getMessage() for record in caplog.records] == ["rollout    4 prompts"]


def test_warnings_of_the_package_come_without_a_line_of_its_code():
    quiet.leave_noise_out()
    own, other = (
        str(quiet.Path(quiet.__file__).parent / "callbacks" / "watchdog.py"),
        "/elsewhere/model.py",
    )
    assert (
        warnings.formatwarning("all is equal", UserWarning, own, 3) == "warning    all is equal\n"
    )
    assert "model.py:3" in warnings.formatwarning("all is equal", UserWarning, other, 3)
    inner = warnings.formatwarning.behind
    quiet.leave_noise_out()
    assert warnings.formatwarning.behind is inner, "once is enough"


def test_what_is_the_same_whatever_is_configured_is_not_warned_of_and_all_else_is():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet.leave_noise_out()
        rank_zero_warn(
            "The 'train_dataloader' does not have many workers which may be a bottleneck."
        )
        rank_zero_warn("Checkpoint directory runs exists and is not empty.")
    assert [str(warning.message) for warning in seen] == [
        "Checkpoint directory runs exists and is not empty."
    ]


def test_bars_of_loading_come_back():
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.is_progress_bar_enabled()
    with quiet.no_loading_bars():
        assert not transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled() == before


@pytest.fixture
def spoken(monkeypatch):
    """What two handlers and the warnings show, in order."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("lightning.fabric.held"), Handler()
    warnings.simplefilter("always")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: lines.append(str(message)))
    yield logger, lines
    logger.removeHandler(handler)


def test_notes_are_held_back_until_a_run_begins(spoken):
    logger, lines = spoken
    notes = quiet.Notes()
    notes.hold()
    logger.info("Seed set to 0")
    warnings.warn("a warning", stacklevel=1)
    logger.error("an error")
    assert lines == ["an error"]
    notes.show()
    assert lines == ["an error", "Seed set to 0", "a warning"]
    logger.info("after")
    assert lines[3:] == ["after"]


def test_notes_of_a_refused_command_are_dropped(spoken):
    logger, lines = spoken
    notes = quiet.Notes()
    notes.hold()
    logger.info("Seed set to 0")
    notes.drop()
    notes.show()
    assert lines == []
    logger.info("after")
    assert lines == ["after"]


def test_a_refused_command_line_says_one_line(spoken):
    logger, lines = spoken

    def call():
        logger.info("Seed set to 0")
        raise UserError("no")

    assert guarded(call) == 2
    assert lines == []

    def fault():
        logger.info("Seed set to 0")
        raise MemoryError

    with pytest.raises(MemoryError):
        guarded(fault)
    assert lines == ["Seed set to 0"]


def test_lightnings_lines_go_where_a_progress_bar_writes_above_itself(monkeypatch):
    shown = io.StringIO()
    for package in ("lightning.pytorch", "lightning.fabric"):  # under pytest they have no handlers
        monkeypatch.setattr(logging.getLogger(package), "handlers", [logging.StreamHandler()])
    quiet.leave_noise_out()
    monkeypatch.setattr(sys, "stderr", shown)  # as rich does while a bar is drawn
    logging.getLogger("lightning.pytorch").warning("a line")
    logging.getLogger("lightning.fabric").warning("another")
    assert shown.getvalue() == "a line\nanother\n"
