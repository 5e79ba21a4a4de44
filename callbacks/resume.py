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
from lightning_mpo.resume.early_stopping import keep_stopped, patiences
from lightning_mpo.resume.entries import SAVED, check_metrics, check_weights
from lightning_mpo.resume.metrics_csv import MetricsCSV
from lightning_mpo.resume.model_checkpoints import model_checkpoints, wrap_saves
from lightning_mpo.resume.optimizer_states import describe_state
from lightning_mpo.resume.random_state import random_state, restore_random_state
from lightning_mpo.resume.restoring import restore_in_one_line, restoring
from lightning_mpo.resume.run_options import changed_callbacks, differences, run_options, shown
from lightning_mpo.resume.saving import check_folders, save_whole

STATE_TYPES: dict[str, type] = {
    **dict.fromkeys(
        ("identity", "configured", "options", "metrics", "saved", "repeated", "row"), dict
    ),
    **dict.fromkeys(("ranks", "rows", "callbacks", "moments"), list),
    **dict.fromkeys(("within_update", "validate"), bool),
    "epoch": int,
}
"""Types of the entries of the state."""
NEVER_EMPTY = ("identity", "configured", "options")
"""Entries that every checkpoint of training fills."""


class ExactResume(RolloutCallback):
    """Saves and restores the state that Lightning's checkpoints leave out.

    A checkpoint is written completely or not at all.

    The state of this callback holds the random number generators of every rank and the length of
    `metrics.csv`. It also holds two things that a save in the middle of a step would lose: the
    metrics row that follows the save, and a validation that is due.
    """

    def __init__(self) -> None:
        self._loaded_state: dict[str, Any] = {}
        """This callback's state from the checkpoint, until training starts."""
        self._pending_random_state: dict[str, Any] | None = None
        """State of this rank's generators, until the first rollout or batch restores it."""
        self._repeated_metrics: dict[str, Any] = {}
        """Metrics of earlier batches of the epoch, to log again with the first batch."""
        self._finished_update = -1
        """Last update whose metrics row and validation are done already.

        Lightning's loop counters do not record this.
        """
        self._trainer: L.Trainer | None = None
        self._max_steps: int | None = None
        """The run's `max_steps`, while Lightning is given a larger one."""
        self._identity: dict[str, Any] = {}
        self._run_options: dict[str, Any] = {}
        self._optimizer_options: dict[str, Any] = {}
        self._patiences: list[tuple[Any, int]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer
        restore_in_one_line(trainer)
        self._identity = run_identity(trainer, pl_module)
        self._patiences = patiences(trainer)
        if stage == "fit":
            self._run_options = run_options(trainer, pl_module, data_of(trainer))

        def check(path: Any, content: dict[str, Any]) -> None:
            check_content(trainer, self._identity, path, content, stage, self._run_options)
            with restoring(path):  # loading is not strict, as checkpoints hold what is trained
                check_weights(pl_module, content, stage)

        # checkpoints: checked when loaded, complete when saved
        save_whole(
            trainer.strategy,
            check,
            "all" if stage == "fit" else "weights",
        )
        if stage == "fit" and not is_fast_dev_run(trainer):
            check_folders(folders(trainer))
        # other verbs than `fit` write their rows to another file
        for logger in _csv_loggers(trainer) if stage != "fit" else ():
            logger.experiment.set_aside(str(getattr(stage, "value", stage)))
        for callback in model_checkpoints(trainer):
            wrap_saves(callback)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._optimizer_options = optimizer_options(trainer)
        if self._loaded_state:
            with restoring(trainer.ckpt_path):
                check_kinds(self._loaded_state["configured"], self._optimizer_options)

    # --- saving ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        assert trainer is not None
        state: dict[str, Any] = {
            "identity": self._identity,
            "configured": self._optimizer_options,
            "options": self._run_options,
            "callbacks": [type(callback).__name__ for callback in callbacks_of(trainer)],
            "ranks": gather_ranks({"random": random_state()}),
            "rows": [logger.experiment.mark() for logger in _csv_loggers(trainer)],
            "metrics": _on_cpu(trainer.callback_metrics),
            "moments": [describe_state(optimizer) for optimizer in trainer.strategy.optimizers],
            "saved": {
                callback.state_key: {name: getattr(callback, name) for name in SAVED}
                for callback in model_checkpoints(trainer)
            },
        }
        loop = trainer.fit_loop.epoch_loop
        state["within_update"] = loop._should_accumulate()
        # Lightning repeats logged metrics in each row until the epoch ends
        if not loop.batch_progress.is_last_batch:
            state["repeated"] = self._repeated_metrics | _on_cpu(
                loop._results.metrics(on_step=True)["log"]
            )
        # a save in `on_train_batch_end` comes before the metrics row and the validation
        batches: Any = loop.batch_progress.current
        if batches.completed < batches.processed and trainer.global_step != self._finished_update:
            if trainer._logger_connector.should_update_logs:
                state["row"] = {"epoch": trainer.current_epoch} | _on_cpu(
                    trainer._logger_connector.metrics["log"]
                )
            state["epoch"], fetcher = trainer.current_epoch, trainer.fit_loop._data_fetcher
            assert fetcher is not None
            state["validate"] = trainer.enable_validation and loop._should_check_val_fx(fetcher)
        return state

    # --- resuming ----------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, entry_type in STATE_TYPES.items():
            if not isinstance(state_dict.get(name, entry_type()), entry_type):
                raise TypeError(f"`{name}` of ExactResume must be a {entry_type.__name__}")
        trainer = self._trainer
        empty = [name for name in NEVER_EMPTY if not state_dict.get(name)]
        if empty and trainer is not None and trainer.state.fn == "fit":
            raise ValueError(f"`{empty[0]}` of ExactResume is empty")
        self._loaded_state = state_dict

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a run that was killed after its last update finish; Lightning would skip its end."""
        max_steps, saved_step = trainer.fit_loop.max_steps, checkpoint["global_step"]
        if trainer.state.fn == "fit" and 0 <= max_steps <= saved_step:
            self._max_steps, trainer.fit_loop.epoch_loop.max_steps = max_steps, saved_step + 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        loaded, self._loaded_state = self._loaded_state, {}
        if not loaded:
            return
        with restoring(trainer.ckpt_path):
            self._restore_state(trainer, loaded)
        # metrics row and validation that the save preceded
        connector = trainer._logger_connector
        self._repeated_metrics = loaded.get("repeated", {})
        self._finished_update = trainer.global_step
        if loaded.get("row"):
            connector.log_metrics(loaded["row"])
        if loaded.get("validate"):
            self._run_due_validation(trainer, loaded["epoch"])
        # Lightning makes iterators after this hook, which draw seeds
        self._pending_random_state = random_state()

    def _restore_state(self, trainer: L.Trainer, loaded: dict[str, Any]) -> None:
        for name in ("repeated", "metrics", "row"):
            check_metrics(name, loaded.get(name, {}))
        changed = differences(loaded["options"], self._run_options, "reported")
        self._report_changes(trainer, loaded, changed)
        keep_stopped(trainer, self._patiences, [name for name, *_ in changed])
        self._rewind_metrics_csv(trainer, loaded["rows"])
        self._restore_last_saves(trainer, loaded["saved"])
        ranks, (rank, world) = loaded["ranks"], rank_and_world_size()
        if len(ranks) == world:
            restore_random_state(ranks[rank]["random"])
        trainer._logger_connector._callback_metrics.update(loaded["metrics"])

    def _report_changes(
        self, trainer: L.Trainer, loaded: dict[str, Any], changed: list[tuple[str, Any, Any]]
    ) -> None:
        lines = apply_changed_options(trainer, loaded["configured"], self._optimizer_options)
        lines += [f"{shown(name)} was {before} and is {now}" for name, before, now in changed]
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
    def _restore_last_saves(trainer: L.Trainer, saved: dict[str, dict[str, Any]]) -> None:
        """Restore the last save of each `ModelCheckpoint`, unless it was in another folder."""
        for callback in model_checkpoints(trainer):
            attributes = saved.get(callback.state_key, {})
            path, folder = attributes.get("_last_checkpoint_saved"), callback.dirpath
            if not path or (folder is not None and Path(path).parent == Path(folder)):
                for name, value in attributes.items():
                    setattr(callback, name, value)

    @staticmethod
    def _rewind_metrics_csv(trainer: L.Trainer, row_counts: list[int]) -> None:
        """Cut each `metrics.csv` back to the rows that it had at the save."""
        for logger, rows in zip(_csv_loggers(trainer), row_counts, strict=False):
            remaining = logger.experiment.rewind(rows)
            if remaining < rows:
                rank_zero_info(
                    f"resume     {logger.experiment.path} holds {remaining} of the {rows} rows "
                    "logged before"
                )

    @staticmethod
    def _run_due_validation(trainer: L.Trainer, epoch: int) -> None:
        """Run the validation that was due at the save, under the epoch of the save.

        Lightning 2.6.6 counts it as done.
        """
        loop, progress = (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.fit_loop.epoch_progress.current,
        )
        trainer.validating = True
        loop.restarting = False
        present_epoch, progress.completed = progress.completed, epoch
        loop.run()
        progress.completed = present_epoch
        trainer.training = True

    def on_rollout_start(
        self, trainer: L.Trainer, module: PolicyOptimization, sequences: int, limit: int
    ) -> None:
        self._restore_generators()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._restore_generators()
        for name, value in self._repeated_metrics.items():
            pl_module.log(name, value, on_step=True, on_epoch=False)
        self._repeated_metrics = {}

    def _restore_generators(self) -> None:
        """Restore the generators once, at the first of two hooks.

        `RolloutLoop` may sample before `on_train_batch_start` of this callback.
        """
        if self._pending_random_state is not None:
            restore_random_state(self._pending_random_state)
            self._pending_random_state = None


def _csv_loggers(trainer: L.Trainer) -> list[MetricsCSV]:
    """Return the CSV loggers of rank 0; other ranks log nothing."""
    return (
        [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
        if trainer.is_global_zero
        else []
    )


def _on_cpu(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics whose tensors are on the CPU and without a gradient."""
    return {
        name: value.detach().cpu() if hasattr(value, "detach") else value
        for name, value in metrics.items()
    }
