"""Resumes a killed run exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.parallel import gather_ranks, rank_and_world_size
from lightning_mpo.modules.trainer import callbacks_of, data_of, is_fast_dev_run
from lightning_mpo.resume.changed_options import (
    apply_changed_options,
    check_kinds,
    optimizer_options,
)
from lightning_mpo.resume.checkpoints import check_content, folders, run_identity
from lightning_mpo.resume.entries import SAVED, check_metrics, check_weights
from lightning_mpo.resume.metrics_csv import MetricsCSV
from lightning_mpo.resume.model_checkpoints import model_checkpoints, wrap_saves
from lightning_mpo.resume.optimizer_states import describe_state
from lightning_mpo.resume.random_state import random_state, restore_random_state
from lightning_mpo.resume.restoring import restore_in_one_line, restoring
from lightning_mpo.resume.run_options import changed_callbacks, differences, run_options, shown
from lightning_mpo.resume.saving import check_folders, save_whole

KEPT: dict[str, type] = {
    **dict.fromkeys(
        ("identity", "configured", "options", "metrics", "saved", "repeated", "row"), dict
    ),
    **dict.fromkeys(("ranks", "rows", "callbacks", "moments"), list),
    **dict.fromkeys(("within_update", "validate"), bool),
    "epoch": int,
}
"""Entries of the state, and their types."""
FILLED = ("identity", "configured", "options")
"""Entries that are never empty in a checkpoint of training."""


class ExactResume(RolloutCallback):
    """Saves and restores the state that Lightning's checkpoints leave out.

    Checkpoints are written whole or not at all.

    Saved besides weights, optimiser, schedule, loops and rollout: the state of every rank's random
    number generators, the length of `metrics.csv`, and what a save in the middle of a step would
    lose: the row that is logged right behind it, and a validation that is due.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}
        self._random: dict[str, Any] | None = None
        self._repeated: dict[str, Any] = {}
        self._settled = -1
        """Last update whose metrics row and validation are done already.

        Lightning's loop counters do not record this.
        """
        self._trainer: L.Trainer | None = None
        self._limit: int | None = None
        self._identity: dict[str, Any] = {}
        self._options: dict[str, Any] = {}
        self._configured: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer
        restore_in_one_line(trainer)
        self._identity = run_identity(trainer, pl_module)
        if stage == "fit":
            self._options = run_options(trainer, pl_module, data_of(trainer))

        def check(path: Any, content: dict[str, Any]) -> None:
            check_content(trainer, self._identity, path, content, stage, self._options)
            with restoring(path):  # loading is not strict, as checkpoints hold what is trained
                check_weights(pl_module, content, stage)

        save_whole(
            trainer.strategy,
            check,
            "all" if stage == "fit" else "weights",
        )
        if stage == "fit" and not is_fast_dev_run(trainer):
            check_folders(folders(trainer))
        for logger in _csv_loggers(trainer) if stage != "fit" else ():
            logger.experiment.set_aside(str(getattr(stage, "value", stage)))
        for callback in model_checkpoints(trainer):
            wrap_saves(callback)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._configured = optimizer_options(trainer)
        if self._loaded:
            with restoring(trainer.ckpt_path):
                check_kinds(self._loaded["configured"], self._configured)

    # --- saving ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        assert trainer is not None
        state: dict[str, Any] = {
            "identity": self._identity,
            "configured": self._configured,
            "options": self._options,
            "callbacks": [type(callback).__name__ for callback in callbacks_of(trainer)],
            "ranks": gather_ranks({"random": random_state()}),
            "rows": [logger.experiment.mark() for logger in _csv_loggers(trainer)],
            "metrics": _plain(trainer.callback_metrics),
            "moments": [describe_state(optimizer) for optimizer in trainer.strategy.optimizers],
            "saved": {
                callback.state_key: {name: getattr(callback, name) for name in SAVED}
                for callback in model_checkpoints(trainer)
            },
        }
        loop = trainer.fit_loop.epoch_loop
        state["within_update"] = loop._should_accumulate()
        if (
            not loop.batch_progress.is_last_batch
        ):  # what was logged is repeated until the epoch ends
            state["repeated"] = self._repeated | _plain(loop._results.metrics(on_step=True)["log"])
        batches: Any = loop.batch_progress.current
        if (
            batches.completed < batches.processed and trainer.global_step != self._settled
        ):  # in `on_train_batch_end`
            if trainer._logger_connector.should_update_logs:
                state["row"] = {"epoch": trainer.current_epoch} | _plain(
                    trainer._logger_connector.metrics["log"]
                )
            state["epoch"], fetcher = trainer.current_epoch, trainer.fit_loop._data_fetcher
            assert fetcher is not None
            state["validate"] = trainer.enable_validation and loop._should_check_val_fx(fetcher)
        return state

    # --- going on ----------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, kind in KEPT.items():
            if not isinstance(state_dict.get(name, kind()), kind):
                raise TypeError(f"`{name}` of ExactResume must be a {kind.__name__}")
        trainer = self._trainer
        empty = [name for name in FILLED if not state_dict.get(name)]
        if empty and trainer is not None and trainer.state.fn == "fit":
            raise ValueError(f"`{empty[0]}` of ExactResume is empty")
        self._loaded = state_dict

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a run that was killed after its last update finish, which Lightning would skip."""
        limit, step = trainer.fit_loop.max_steps, checkpoint["global_step"]
        if trainer.state.fn == "fit" and 0 <= limit <= step:
            self._limit, trainer.fit_loop.epoch_loop.max_steps = limit, step + 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._limit is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._limit = self._limit, None
        loaded, self._loaded = self._loaded, {}
        if not loaded:
            return
        with restoring(trainer.ckpt_path):
            self._take(trainer, loaded)
        connector = trainer._logger_connector
        self._repeated = loaded.get("repeated", {})
        self._settled = trainer.global_step
        if loaded.get("row"):
            connector.log_metrics(loaded["row"])
        if loaded.get("validate"):
            self._validate(trainer, loaded["epoch"])
        self._random = random_state()  # Lightning still makes iterators, which draw seeds

    def _take(self, trainer: L.Trainer, loaded: dict[str, Any]) -> None:
        for name in ("repeated", "metrics", "row"):
            check_metrics(name, loaded.get(name, {}))
        self._say_what_changed(trainer, loaded)
        self._rewind(trainer, loaded["rows"])
        self._remember_saves(trainer, loaded["saved"])
        ranks, (rank, world) = loaded["ranks"], rank_and_world_size()
        if len(ranks) == world:
            restore_random_state(ranks[rank]["random"])
        trainer._logger_connector._callback_metrics.update(loaded["metrics"])

    def _say_what_changed(self, trainer: L.Trainer, loaded: dict[str, Any]) -> None:
        lines = apply_changed_options(trainer, loaded["configured"], self._configured)
        apart = differences(loaded["options"], self._options, "reported")
        lines += [f"{shown(name)} was {before} and is {now}" for name, before, now in apart]
        for line in lines:
            rank_zero_info(f"resume     {line}: the configuration wins")
        for line in changed_callbacks(loaded["callbacks"], trainer):
            rank_zero_info(f"resume     {line}")
        if loaded["within_update"]:
            rank_zero_warn(
                "the checkpoint was saved in the middle of an update, whose gradients are lost: "
                "not exact"
            )

    @staticmethod
    def _remember_saves(trainer: L.Trainer, saved: dict[str, dict[str, Any]]) -> None:
        """Restore the last save of each `ModelCheckpoint`, unless it was in another folder."""
        for callback in model_checkpoints(trainer):
            known = saved.get(callback.state_key, {})
            path, folder = known.get("_last_checkpoint_saved"), callback.dirpath
            if not path or (folder is not None and Path(path).parent == Path(folder)):
                for name, value in known.items():
                    setattr(callback, name, value)

    @staticmethod
    def _rewind(trainer: L.Trainer, rows: list[int]) -> None:
        for logger, count in zip(_csv_loggers(trainer), rows, strict=False):
            kept = logger.experiment.rewind(count)
            if kept < count:
                rank_zero_info(
                    f"resume     {logger.experiment.path} holds {kept} of the {count} rows logged "
                    "before"
                )

    @staticmethod
    def _validate(trainer: L.Trainer, epoch: int) -> None:
        """Run the validation that was due, in its own epoch; Lightning 2.6.6 counts it as done."""
        loop, progress = (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.fit_loop.epoch_progress.current,
        )
        trainer.validating = True
        loop.restarting = False
        now, progress.completed = progress.completed, epoch
        loop.run()
        progress.completed = now
        trainer.training = True

    def on_rollout_start(
        self, trainer: L.Trainer, module: PolicyOptimization, sequences: int, limit: int
    ) -> None:
        self._restore()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._restore()
        for name, value in self._repeated.items():
            pl_module.log(name, value, on_step=True, on_epoch=False)
        self._repeated = {}

    def _restore(self) -> None:
        """Restore the generators once; `RolloutLoop` may sample before this callback's turn."""
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None


def _csv_loggers(trainer: L.Trainer) -> list[MetricsCSV]:
    """Return the CSV loggers of rank 0; other ranks log nothing."""
    return (
        [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
        if trainer.is_global_zero
        else []
    )


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().cpu() if hasattr(value, "detach") else value
        for name, value in metrics.items()
    }
