"""`warmup:`, a stage that is fitted first, as a separate process, if its checkpoint is missing."""

from __future__ import annotations

import os
from typing import Any

import lightning as L

from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.cli.stage_entry import Entry, run_entry
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.recipes import find


def check_before_stage(trainer: L.Trainer, module: Any, data: Any) -> None:
    """Refuse mistakes of a run before its warm-up stage, if they can be seen without the checkpoint.

    Args:
        trainer: the trainer of the run, with its callbacks.
        module: the module of the run.
        data: the data of the run.

    Raises:
        UserError: options do not fit each other.
    """
    if not isinstance(module, PolicyOptimization) or not isinstance(data, PromptDataModule):
        return
    for callback in callbacks_of(trainer):
        if isinstance(callback, RolloutLoop):
            callback.check(module.policy, module.objective, data, "fit")
    # check the policy without its checkpoint, which is missing
    policy: Any = module.policy
    checkpoint, policy.checkpoint = policy.checkpoint, None
    try:
        policy.check(module.objective.request)
    finally:
        policy.checkpoint = checkpoint


def fit_first(config: str, checkpoint: str, seed: Any) -> None:
    """Run the stage that makes a checkpoint; a stage that was stopped before continues.

    Args:
        config: configuration of the stage.
        checkpoint: the file that it makes.
        seed: seed of the run; None: that of the stage.

    Raises:
        UserError: the stage failed, did not write the checkpoint, or would run beside other
            processes.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"`policy.checkpoint` {checkpoint!r} is missing; make it first: "
            f"lightning-mpo fit -c {config}"
        )
    find(config, place="`warmup`: ")
    words = ["fit", "-c", config]
    words += ["--seed_everything", str(seed)] if seed is not None else []
    shown = f"`policy.checkpoint` {checkpoint!r}"
    entry = Entry("warm-up", config, tuple(words), checkpoint, shown)
    state = "unfinished" if entry.path.exists() else "missing"
    print(f"warm-up    {checkpoint} is {state}: fitting {config} first", flush=True)
    run_entry(entry)
