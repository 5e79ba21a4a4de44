"""Which checkpoint a run goes on from, and whether it may."""

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
    own: dict[str, Any],
    path: Any,
    content: dict[str, Any],
    stage: str,
    options: dict[str, Any] | None = None,
) -> None:
    """Refuse a checkpoint that this run cannot go on from, in one line.

    Args:
        trainer: of the run.
        own: its identity.
        path: of the checkpoint.
        content: what was read from it.
        stage: "fit", where the algorithm and the number of processes count too.
        options: those of the run (`run_options`), where they are to be compared.

    Raises:
        UserError: what differs, and the way out.
    """
    if stage == "fit" and "callbacks" not in content:
        raise UserError(
            f"the checkpoint {path} holds weights alone, as `save_weights_only: true` writes them, and no run can go on "
            "from it: for a new one from these weights give `policy.checkpoint` instead of `--ckpt_path`"
        )
    with restoring(path):
        if stage == "fit":
            _check_entries(trainer, own, path, content)
            check_callbacks(trainer, content)
        check_loops(trainer, content, stage)
        _check_state(
            trainer, own, path, content.get("callbacks", {}).get("ExactResume"), stage, options
        )


def _check_entries(
    trainer: L.Trainer, own: dict[str, Any], path: Any, content: dict[str, Any]
) -> None:
    """Refuse a checkpoint without what training goes on from; Lightning would begin those parts afresh."""
    needed = ["global_step", "pytorch-lightning_version", "loops", "lr_schedulers"]
    lacking = [repr(name) for name in needed if name not in content]
    if "rollout.prompts" in own:
        sources = [
            callback for callback in callbacks_of(trainer) if isinstance(callback, RolloutSource)
        ]
        lacking += [
            f"state of {type(one).__name__}"
            for one in sources
            if not content["callbacks"].get(one.state_key)
        ]
    if lacking:
        raise UserError(
            f"the checkpoint {path} has no {lacking[0]}, so a run cannot go on from it; for a new run from its weights give "
            "`policy.checkpoint`"
        )


def _check_state(
    trainer: L.Trainer,
    own: dict[str, Any],
    path: Any,
    state: Any,
    stage: str,
    options: dict[str, Any] | None,
) -> None:
    if state is None:
        if stage == "fit":
            rank_zero_warn(
                f"the checkpoint {path} has no state of ExactResume: its options are not compared with the run's, and the "
                "random numbers begin afresh"
            )
        return
    lacking = [name for name in own if name not in state["identity"]] if stage == "fit" else []
    if lacking:
        raise ValueError(f"`identity` of ExactResume has no {lacking[0]!r}")
    apart = differences(state["options"], options, "refused") if options else []
    check_identity(path, state["identity"], own, algorithm=stage == "fit", options=apart)
    saved, now = len(state["ranks"]), trainer.world_size
    if stage == "fit" and saved != now:
        raise UserError(
            f"the checkpoint {path} was saved by {saved} processes and cannot be resumed by {now}: give as many "
            "`trainer.devices` and `trainer.num_nodes`, or `policy.checkpoint` for a new run from its weights"
        )


def settle_checkpoint(
    trainer: L.Trainer,
    module: L.LightningModule,
    wanted: str | None,
    *,
    stage: str,
    data: Any = None,
) -> str | None:
    """Return the checkpoint to go on from, checked, or None to begin afresh; say which it is.

    Args:
        trainer: of the run.
        module: not built yet.
        wanted: a path, "last" (the newest `last*.ckpt` in the folders of the checkpoints), another name that Lightning
            knows, or None.
        stage: the verb.
        data: the data module, whose rows are read to be compared.

    Raises:
        UserError: the checkpoint is damaged or of another run, there is none to evaluate, or a folder cannot be written.
    """
    if stage == "fit" and not is_fast_dev_run(trainer):
        check_folders(folders(trainer))
    if wanted is None or wanted in ("best", "hpc"):
        return wanted
    path: Path | None = locate(wanted)
    if wanted == "last":
        path = find_last(trainer)
        if path is None and stage == "fit":
            rank_zero_info(
                f"resume     no last.ckpt in {last_path(trainer).parent}: starting afresh{_elsewhere(trainer)}"
            )
            return None
        if path is None:
            raise UserError(
                f"`--ckpt_path last`: there is no last.ckpt in {last_path(trainer).parent}"
            )
    assert path is not None
    try:
        content = read_checkpoint(path, part="outline")
    except UserError as error:
        others = [other for other in path.parent.glob("*.ckpt") if other != path]
        if wanted != "last" or not others:
            raise
        raise UserError(
            f"{error}; there is also {max(others, key=lambda other: other.stat().st_mtime)}"
        ) from error
    options = run_options(trainer, module, data) if stage == "fit" and data is not None else None
    check_content(trainer, run_identity(trainer, module), path, content, stage, options)
    if stage == "fit":
        if not is_sealed(path):
            rank_zero_warn(
                f"the checkpoint {path} has no checksum of this package, so it was written or changed elsewhere: its "
                "entries are taken as they are"
            )
        rank_zero_info(f"resume     from {path}, update {content['global_step']}")
    return str(path)


def last_path(trainer: L.Trainer) -> Path:
    """Return where `--ckpt_path last` looks: `last.ckpt` in the folder of the checkpoints."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return (
                Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
            )
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"


def find_last(trainer: L.Trainer) -> Path | None:
    """Return the newest `last*.ckpt` of a run; what is being written has another name."""
    places = {last_path(trainer).parent} | {
        Path(callback.dirpath)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.dirpath
    }
    found = [path for folder in sorted(places) for path in find(folder, "last*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _elsewhere(trainer: L.Trainer) -> str:
    """Name the newest checkpoint of a `ModelCheckpoint` without `dirpath`: each run has a folder of its own there."""
    versions = Path(trainer.default_root_dir) / "lightning_logs"
    saved = [
        path
        for folder in sorted(versions.glob("version_*/checkpoints"))
        for path in find(folder, "*.ckpt")
    ]
    if not saved:
        return ""
    return f" (to go on from an earlier run: --ckpt_path '{max(saved, key=lambda path: path.stat().st_mtime)}')"


def folders(trainer: L.Trainer) -> list[str]:
    """Return the folders that a run writes to."""
    found = [trainer.default_root_dir, *(logger.save_dir for logger in trainer.loggers)]
    found += [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [str(folder) for folder in dict.fromkeys(found) if folder is not None]


def run_identity(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """Return what checkpoints of a run can be recognised by: the module, and how rollouts are spent."""
    found = identity(module)
    for source in callbacks_of(trainer):
        if isinstance(source, RolloutSource) and isinstance(module, PolicyOptimization):
            names = ("prompts", "completions", "minibatches", "epochs")
            found |= {f"rollout.{name}": getattr(source, name) for name in names}
    return found | {"trainer.accumulate_grad_batches": trainer.accumulate_grad_batches}
