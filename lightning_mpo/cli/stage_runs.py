"""Runs a list of stages, after a check of them all."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_mpo.cli import annotate
from lightning_mpo.cli.messages import parser_mistake
from lightning_mpo.cli.mistakes import explain
from lightning_mpo.cli.plan_objects import PlanCLI, build, without_notes
from lightning_mpo.cli.stage_entry import Entry, run_entry
from lightning_mpo.cli.stage_metrics import write_metrics
from lightning_mpo.cli.stages import CHECKPOINT, REFERENCE_CHECKPOINT, StageList
from lightning_mpo.cli.warmup_stage import check_before_stage
from lightning_mpo.errors import UserError
from lightning_mpo.modules.monitors import check_callbacks
from lightning_mpo.resume.model_checkpoints import model_checkpoints
from lightning_mpo.storage.lock import FolderLock


def run_list(plan: StageList) -> None:
    """Run all stages that have not ended; a stage that was stopped continues.

    Args:
        plan: the list.

    Raises:
        UserError: a stage has a mistake, failed, or would run beside other processes.
        Preempted: a signal stopped a stage.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a list of stages starts its own processes: run it without a launcher")
    # mistakes of all stages come before the first one
    checkpoints: dict[str, Path] = {}
    for stage, entry in plan.entries(checkpoints, rounds=1):
        with explained(stage.name):
            if stage.verb == "annotate":
                check_annotate(entry.words[1:])
            else:
                has_data = not any("${stages." in word for word in stage.options)
                # a later round may give it a checkpoint
                words = [*entry.words[1:], *([CHECKPOINT, "none"] if stage.start else [])]
                folder = Path(entry.words[-1])
                checkpoints[stage.name] = check_fit(tuple(words), folder, has_data)
    entries = [entry for _, entry in plan.entries(checkpoints, plan.rounds)]
    if plan.prints:
        print("\n".join(f"lightning-mpo {shlex.join(entry.words)}" for entry in entries))
        return
    _check_order(entries)
    # run what is left
    lock = FolderLock(plan.folder)
    try:
        for entry in entries:
            command = f"lightning-mpo {shlex.join(entry.words)}"
            if entry.is_done:
                print(f"stage      {entry.name} is done", flush=True)
            else:
                state = "begins" if entry.checkpoint is None else "continues"
                print(f"stage      {entry.name} {state}: {command}", flush=True)
                run_entry(entry)
            write_metrics(plan.folder, [entry.name for entry in entries])
    finally:
        lock.release()


def _check_order(entries: Sequence[Entry]) -> None:
    """Refuse results of stages whose earlier stages have not ended."""
    first = next((i for i, entry in enumerate(entries) if not entry.is_done), len(entries))
    for entry in entries[first + 1 :]:
        if entry.is_there or entry.is_unfinished:
            raise UserError(
                f"{entry.result} is there, and stage {entries[first].name}, which comes before it, "
                "has not ended: move it away, or give another `folder`"
            )


# --- mistakes that show before the first stage ---


class StageCLI(PlanCLI):
    """Makes module, data and trainer of a stage that trains."""

    trains = True


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Name the stage in messages on mistakes of the user."""
    try:
        yield
    except Exception as error:
        line = parser_mistake(error) or explain(error)
        if line is None:
            raise
        raise UserError(f"stage {name!r}: {line}") from error


def check_fit(words: Sequence[str], folder: Path, has_data: bool) -> Path:
    """Check a stage that trains; return the path of its checkpoint in its folder.

    Args:
        words: its command line, without the verb.
        folder: its folder.
        has_data: whether its data do not come from an earlier stage, so that they can be read.

    Raises:
        UserError: an option is wrong, or the stage writes no `last.ckpt`, or writes elsewhere.
    """
    with without_notes():
        module, data, trainer = build(words, StageCLI)
        check_callbacks(trainer, module)
        if REFERENCE_CHECKPOINT in words:
            module.policy.reference_checkpoint = None  # an earlier stage writes it
        if has_data:
            check_before_stage(trainer, module, data)
    saving = next((part for part in model_checkpoints(trainer) if part.save_last), None)
    if saving is None or not saving.dirpath:
        raise UserError(
            "it writes no `last.ckpt`, which the list of stages needs: give it `ModelCheckpoint` "
            "with `save_last: true` and `dirpath: ${trainer.default_root_dir}`"
        )
    last = Path(saving.dirpath) / f"{saving.CHECKPOINT_NAME_LAST}{saving.FILE_EXTENSION}"
    logs = [Path(log) for logger in trainer.loggers if (log := getattr(logger, "log_dir", None))]
    for path in (last.parent, *logs):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"it writes into {str(path)!r}, not into its folder {str(folder)!r}: write "
                "`dirpath: ${trainer.default_root_dir}` for checkpoints, and for loggers "
                "`save_dir: ${trainer.default_root_dir}`, `name: ''`, `version: ''`"
            )
    return last.resolve().relative_to(folder.resolve())


def check_annotate(words: Sequence[str]) -> None:
    """Check a stage that writes thoughts into files, without its checkpoint.

    Args:
        words: its command line, without the verb.

    Raises:
        UserError: an option is wrong, or the configuration is not that of an E-step.
    """
    with without_notes():
        annotate.read(words)
