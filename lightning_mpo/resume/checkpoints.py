"""Finds the checkpoint that a run resumes from, and refuses one of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mpo.errors import UserError
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.source import RolloutSource
from lightning_mpo.modules.trainer import callbacks_of, is_fast_dev_run
from lightning_mpo.resume.entries import check_callbacks, check_loops
from lightning_mpo.resume.identity import check_identity, identity
from lightning_mpo.resume.restoring import restoring
from lightning_mpo.resume.run_options import differences, run_options
from lightning_mpo.resume.saving import check_folders
from lightning_mpo.storage import find, is_sealed, locate, read_checkpoint


def check_content(
    trainer: L.Trainer,
    current: dict[str, Any],
    path: Any,
    content: dict[str, Any],
    stage: str,
    options: dict[str, Any] | None = None,
) -> None:
    """Refuse a checkpoint that this run cannot resume from, in one line.

    Args:
        trainer: of the run.
        current: its identity.
        path: of the checkpoint.
        content: what was read from it.
        stage: "fit", where the algorithm and the number of processes count too.
        options: those of the run (`run_options`), where they are to be compared.

    Raises:
        UserError: what differs, and the way out.
    """
    if stage == "fit" and "callbacks" not in content:
        raise UserError(
            f"the checkpoint {path} holds weights alone, as `save_weights_only: true` writes "
            "them, and no run can go on from it: for a new one from these weights give "
            "`policy.checkpoint` instead of `--ckpt_path`"
        )
    with restoring(path):
        if stage == "fit":
            _check_entries(trainer, current, path, content)
            check_callbacks(trainer, content)
        check_loops(trainer, content, stage)
        _check_state(
            trainer, current, path, content.get("callbacks", {}).get("ExactResume"), stage, options
        )


def _check_entries(
    trainer: L.Trainer, current: dict[str, Any], path: Any, content: dict[str, Any]
) -> None:
    """Refuse a checkpoint that lacks an entry, which Lightning would start afresh."""
    needed = ["global_step", "pytorch-lightning_version", "loops", "lr_schedulers"]
    missing = [repr(name) for name in needed if name not in content]
    if "rollout.prompts" in current:
        sources = [
            callback for callback in callbacks_of(trainer) if isinstance(callback, RolloutSource)
        ]
        missing += [
            f"state of {type(one).__name__}"
            for one in sources
            if not content["callbacks"].get(one.state_key)
        ]
    if missing:
        raise UserError(
            f"the checkpoint {path} has no {missing[0]}, so a run cannot go on from it; for a new "
            "run from its weights give `policy.checkpoint`"
        )


def _check_state(
    trainer: L.Trainer,
    current: dict[str, Any],
    path: Any,
    state: Any,
    stage: str,
    options: dict[str, Any] | None,
) -> None:
    if state is None:
        if stage == "fit":
            rank_zero_warn(
                f"the checkpoint {path} has no state of ExactResume: its options are not compared "
                "with the run's, and the random numbers begin afresh"
            )
        return
    # identity and options
    missing = [name for name in current if name not in state["identity"]] if stage == "fit" else []
    if missing:
        raise ValueError(f"`identity` of ExactResume has no {missing[0]!r}")
    apart = differences(state["options"], options, "refused") if options else []
    check_identity(path, state["identity"], current, algorithm=stage == "fit", options=apart)
    # number of processes
    saved, now = len(state["ranks"]), trainer.world_size
    if stage == "fit" and saved != now:
        raise UserError(
            f"the checkpoint {path} was saved by {saved} processes and cannot be resumed by "
            f"{now}: give as many `trainer.devices` and `trainer.num_nodes`, or "
            "`policy.checkpoint` for a new run from its weights"
        )


def find_checkpoint(
    trainer: L.Trainer,
    module: L.LightningModule,
    requested: str | None,
    *,
    stage: str,
    data: Any = None,
) -> str | None:
    """Return the checkpoint to resume from, checked, or None to begin afresh; print which.

    Args:
        trainer: of the run.
        module: not built yet.
        requested: a path, "last" (the newest `last*.ckpt` in the folders of the checkpoints),
            another name that Lightning knows, or None.
        stage: the verb.
        data: the data module, whose rows are read to be compared.

    Raises:
        UserError: the checkpoint is damaged or of another run, there is none to evaluate, or a
            folder cannot be written.
    """
    if stage == "fit" and not is_fast_dev_run(trainer):
        check_folders(folders(trainer))
    # names that Lightning resolves
    if requested is None or requested in ("best", "hpc"):
        return requested
    # the path, or the newest `last*.ckpt`
    path = _newest_or_none(trainer, stage) if requested == "last" else locate(requested)
    if path is None:
        return None
    # read and check it without its tensors
    try:
        content = read_checkpoint(path, part="outline")
    except UserError as error:
        others = [other for other in path.parent.glob("*.ckpt") if other != path]
        if requested != "last" or not others:
            raise
        raise UserError(
            f"{error}; there is also {max(others, key=lambda other: other.stat().st_mtime)}"
        ) from error
    options = run_options(trainer, module, data) if stage == "fit" and data is not None else None
    check_content(trainer, run_identity(trainer, module), path, content, stage, options)
    if stage == "fit":
        # announce it
        if not is_sealed(path):
            rank_zero_warn(
                f"the checkpoint {path} has no checksum of this package, so it was written or "
                "changed elsewhere: its entries are taken as they are"
            )
        rank_zero_info(f"resume     from {path}, update {content['global_step']}")
    return str(path)


def _newest_or_none(trainer: L.Trainer, stage: str) -> Path | None:
    """Return the newest `last*.ckpt`; None, with a message: training begins afresh.

    Raises:
        UserError: another verb than `fit` has no checkpoint to evaluate.
    """
    path, folder = find_last(trainer), last_path(trainer).parent
    if path is None and stage != "fit":
        raise UserError(f"`--ckpt_path last`: there is no last.ckpt in {folder}")
    if path is None:
        rank_zero_info(f"resume     no last.ckpt in {folder}: starting afresh{_elsewhere(trainer)}")
    return path


def last_path(trainer: L.Trainer) -> Path:
    """Return where `--ckpt_path last` looks: `last.ckpt` in the folder of the checkpoints."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return (
                Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            )
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"


def find_last(trainer: L.Trainer) -> Path | None:
    """Return the newest `last*.ckpt` of a run; unfinished files have other names."""
    checkpoint_folders = {last_path(trainer).parent} | {
        Path(callback.dirpath)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.dirpath
    }
    found = [path for folder in sorted(checkpoint_folders) for path in find(folder, "last*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _elsewhere(trainer: L.Trainer) -> str:
    """Return a hint to the newest checkpoint of a `ModelCheckpoint` without `dirpath`.

    Each of its runs has its own folder.
    """
    versions = Path(trainer.default_root_dir) / "lightning_logs"
    saved = [
        path
        for folder in sorted(versions.glob("version_*/checkpoints"))
        for path in find(folder, "*.ckpt")
    ]
    if not saved:
        return ""
    newest = max(saved, key=lambda path: path.stat().st_mtime)
    return f" (to go on from an earlier run: --ckpt_path '{newest}')"


def folders(trainer: L.Trainer) -> list[str]:
    """Return the folders that a run writes to."""
    found = [trainer.default_root_dir, *(logger.save_dir for logger in trainer.loggers)]
    found += [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [str(folder) for folder in dict.fromkeys(found) if folder is not None]


def run_identity(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """Return the identity of a run: its module, and how rollouts are spent."""
    found = identity(module)
    for source in callbacks_of(trainer):
        if isinstance(source, RolloutSource) and isinstance(module, PolicyOptimization):
            names = ("prompts", "completions", "minibatches", "epochs")
            found |= {f"rollout.{name}": getattr(source, name) for name in names}
    return found | {"trainer.accumulate_grad_batches": trainer.accumulate_grad_batches}
