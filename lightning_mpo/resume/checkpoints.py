"""Finds the checkpoint that a run resumes from, and refuses a checkpoint of another run."""

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
        trainer: the trainer of this run.
        current: the identity of this run (`run_identity`).
        path: path of the checkpoint.
        content: entries of the checkpoint.
        stage: the verb; "fit" also compares the algorithm and the number of processes.
        options: the options of this run (`run_options`); None: not compared.

    Raises:
        UserError: the run cannot resume from it; the message says the reason and the way out.
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
    """Refuse a checkpoint without an entry that Lightning would silently start afresh."""
    needed = ["global_step", "pytorch-lightning_version", "loops", "lr_schedulers"]
    missing = [repr(name) for name in needed if name not in content]
    if "rollout.prompts" in current:
        sources = [
            callback for callback in callbacks_of(trainer) if isinstance(callback, RolloutSource)
        ]
        missing += [
            f"state of {type(source).__name__}"
            for source in sources
            if not content["callbacks"].get(source.state_key)
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
    """Compare this run with the state of `ExactResume` in the checkpoint."""
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
    changes = differences(state["options"], options, "refused") if options else []
    check_identity(path, state["identity"], current, algorithm=stage == "fit", options=changes)
    # number of processes
    saved_processes, processes = len(state["ranks"]), trainer.world_size
    if stage == "fit" and saved_processes != processes:
        raise UserError(
            f"the checkpoint {path} was saved by {saved_processes} processes and cannot be "
            f"resumed by {processes}: give as many `trainer.devices` and `trainer.num_nodes`, or "
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
    """Find and check the checkpoint to resume from, and print its path.

    Args:
        trainer: the trainer of this run.
        module: the module, which need not be built yet.
        requested: a path, "last" (the newest `last*.ckpt` in the folders of the checkpoints),
            "best" or "hpc" (resolved by Lightning), or None.
        stage: the verb.
        data: the data module, whose rows are compared; None: no options are compared.

    Returns:
        The path, "best" or "hpc" unchanged, or None to begin afresh.

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
        other_paths = [other for other in path.parent.glob("*.ckpt") if other != path]
        if requested != "last" or not other_paths:
            raise
        newest_other = max(other_paths, key=lambda other: other.stat().st_mtime)
        raise UserError(f"{error}; there is also {newest_other}") from error
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
    """Return the newest `last*.ckpt`, or None after a message that training begins afresh.

    Raises:
        UserError: there is none, and the verb is not `fit`.
    """
    path, folder = find_last(trainer), last_path(trainer).parent
    if path is None and stage != "fit":
        raise UserError(f"`--ckpt_path last`: there is no last.ckpt in {folder}")
    if path is None:
        rank_zero_info(f"resume     no last.ckpt in {folder}: starting afresh{_hint(trainer)}")
    return path


def last_path(trainer: L.Trainer) -> Path:
    """Return the path of `last.ckpt` in the folder of the run's checkpoints."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return (
                Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            )
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"


def find_last(trainer: L.Trainer) -> Path | None:
    """Return the newest `last*.ckpt` of a run, or None; unfinished files have other names."""
    checkpoint_folders = {last_path(trainer).parent} | {
        Path(callback.dirpath)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.dirpath
    }
    last_checkpoints = [
        path for folder in sorted(checkpoint_folders) for path in find(folder, "last*.ckpt")
    ]
    return max(last_checkpoints, key=lambda path: path.stat().st_mtime, default=None)


def _hint(trainer: L.Trainer) -> str:
    """Return a hint to the newest checkpoint of earlier runs, or an empty text.

    A `ModelCheckpoint` without `dirpath` saves each run in a new folder of `lightning_logs`.
    """
    versions = Path(trainer.default_root_dir) / "lightning_logs"
    checkpoints = [
        path
        for folder in sorted(versions.glob("version_*/checkpoints"))
        for path in find(folder, "*.ckpt")
    ]
    if not checkpoints:
        return ""
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime)
    return f" (to go on from an earlier run: --ckpt_path '{newest}')"


def folders(trainer: L.Trainer) -> list[str]:
    """Return the folders that a run writes to."""
    paths = [trainer.default_root_dir, *(logger.save_dir for logger in trainer.loggers)]
    paths += [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [str(folder) for folder in dict.fromkeys(paths) if folder is not None]


def run_identity(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """Return the identity of a run: of its module, and of the split of rollouts into updates."""
    identity_entries = identity(module)
    for source in callbacks_of(trainer):
        if isinstance(source, RolloutSource) and isinstance(module, PolicyOptimization):
            names = ("prompts", "completions", "minibatches", "epochs")
            identity_entries |= {f"rollout.{name}": getattr(source, name) for name in names}
    return identity_entries | {"trainer.accumulate_grad_batches": trainer.accumulate_grad_batches}
