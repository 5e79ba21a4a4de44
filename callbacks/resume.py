"""Makes a run that was killed go on as if it had not been."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from lightning_mpo.callbacks.metrics_csv import MetricsCSV
from lightning_mpo.modules.optimization import PolicyOptimization
from lightning_mpo.modules.random_state import random_state, restore_random_state
from lightning_mpo.modules.resume import gather_ranks, place
from lightning_mpo.modules.source import RolloutCallback
from lightning_mpo.modules.storage import AtomicCheckpointIO, check_folders


class ExactResume(RolloutCallback):
    """Saves and restores what Lightning's checkpoints leave out, and has them written whole.

    Saved besides weights, optimiser, schedule, loops and rollout: the state of every rank's random number generators,
    the length of `metrics.csv`, and what a save in the middle of a step would lose: the row that is logged right behind
    it, and a validation that is due.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}
        self._random: dict[str, Any] | None = None
        self._repeated: dict[str, Any] = {}
        self._settled = -1
        """The update whose row and validation are done, where the loops do not say so."""
        self._trainer: L.Trainer | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit":
            check_folders(folders(trainer))

    # --- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        assert trainer is not None
        state: dict[str, Any] = {
            "ranks": gather_ranks({"random": random_state()}),
            "rows": [logger.experiment.mark() for logger in _csv_loggers(trainer)],
            "metrics": _plain(trainer.callback_metrics),
        }
        loop = trainer.fit_loop.epoch_loop
        if not loop.batch_progress.is_last_batch:  # what was logged is repeated until the epoch ends
            state["repeated"] = _plain(loop._results.metrics(on_step=True)["log"])
        batches = loop.batch_progress.current
        if batches.completed < batches.processed and trainer.global_step != self._settled:  # in `on_train_batch_end`
            if trainer._logger_connector.should_update_logs:
                state["row"] = {"epoch": trainer.current_epoch} | _plain(trainer._logger_connector.metrics["log"])
            state["epoch"] = trainer.current_epoch
            state["validate"] = trainer.enable_validation and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        return state

    # --- going on -----------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loaded, self._loaded = self._loaded, {}
        if not loaded:
            return
        self._rewind(trainer, loaded["rows"])
        ranks, (rank, world) = loaded["ranks"], place()
        if len(ranks) == world:
            restore_random_state(ranks[rank]["random"])
        connector = trainer._logger_connector
        connector._callback_metrics.update(loaded["metrics"])
        self._repeated = loaded.get("repeated", {})
        self._settled = trainer.global_step
        if loaded.get("row"):
            connector.log_metrics(loaded["row"])
        if loaded.get("validate"):
            self._validate(trainer, loaded["epoch"])
        self._random = random_state()  # Lightning still makes iterators, which draw seeds

    @staticmethod
    def _rewind(trainer: L.Trainer, rows: list[int]) -> None:
        for logger, count in zip(_csv_loggers(trainer), rows, strict=False):
            kept = logger.experiment.rewind(count)
            if kept < count:
                rank_zero_info(f"resume     {logger.experiment.path} holds {kept} of the {count} rows logged before")

    @staticmethod
    def _validate(trainer: L.Trainer, epoch: int) -> None:
        """Run the validation that was due, in its own epoch; Lightning 2.6.6 counts it as done."""
        loop, progress = trainer.fit_loop.epoch_loop.val_loop, trainer.fit_loop.epoch_progress.current
        trainer.validating = True
        loop.restarting = False
        now, progress.completed = progress.completed, epoch
        loop.run()
        progress.completed = now
        trainer.training = True

    def on_rollout_start(self, trainer: L.Trainer, module: PolicyOptimization, sequences: int, limit: int) -> None:
        self._restore()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._restore()
        for name, value in self._repeated.items():
            pl_module.log(name, value, on_step=True, on_epoch=False)
        self._repeated = {}

    def _restore(self) -> None:
        """Put the generators where they were; `Rollout` may sample before this callback's own turn."""
        if self._random is not None:
            restore_random_state(self._random)
            self._random = None


def folders(trainer: L.Trainer) -> list[str]:
    """Return the folders that a run writes to."""
    found = [trainer.default_root_dir, *(logger.save_dir for logger in trainer.loggers)]
    found += [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [str(folder) for folder in dict.fromkeys(found) if folder is not None]


def _csv_loggers(trainer: L.Trainer) -> list[MetricsCSV]:
    """Return the CSV loggers of rank 0; other ranks log nothing."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)] if trainer.is_global_zero else []


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().cpu() if hasattr(value, "detach") else value for name, value in metrics.items()}
