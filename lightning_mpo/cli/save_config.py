"""The resolved configuration of a run, in its folder and in every logger."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_mpo.cli.hyperparameters import flatten
from lightning_mpo.errors import UserError
from lightning_mpo.quiet import NOTES
from lightning_mpo.resume.checkpoints import last_path
from lightning_mpo.storage.lock import FolderLock


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` once a run begins: one that is refused must not overwrite that of the run before."""

    _locks: tuple[FolderLock, ...] = ()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the run's folders, so that a second run in them is refused; other verbs may look at them meanwhile."""
        if stage != "fit" or not trainer.is_global_zero or trainer.fast_dev_run or self._locks:  # type: ignore[attr-defined]
            return
        places = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        folders = {Path(place) for place in places if place}
        if trainer.loggers and isinstance(trainer.loggers[0], CSVLogger | TensorBoardLogger):
            folders.add(Path(trainer.loggers[0].log_dir))
            self._refuse_folders(Path(trainer.loggers[0].log_dir))
        for folder in sorted({folder.resolve() for folder in folders}):
            self._locks = (*self._locks, FolderLock(folder))

    def _refuse_folders(self, folder: Path) -> None:
        """Refuse folders that stand where the run writes its files."""
        for path in (
            folder / name for name in (self.config_filename, "metrics.csv", "hparams.yaml")
        ):
            if path.is_dir():
                raise UserError(
                    f"{str(path)!r} is a folder, and the run writes a file of that name: move it away, or give the logger "
                    "another `save_dir`"
                )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for lock in reversed(self._locks):
            lock.release()
        self._locks = ()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        NOTES.show()

    on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        NOTES.show()
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # agreed on by all processes
        if not trainer.is_global_zero:
            return
        if trainer.loggers and not isinstance(trainer.loggers[0], CSVLogger | TensorBoardLogger):
            folder = last_path(
                trainer
            ).parent  # the `save_dir` of such a logger belongs to all its runs
            folder = folder.parent if folder.name == "checkpoints" else folder
        options = self.parser.dump(self.config, skip_none=False)
        folder.mkdir(parents=True, exist_ok=True)
        part = (
            folder / f".{self.config_filename}.part"
        )  # a run that is stopped here leaves the file as it was
        part.write_text(options)
        part.replace(folder / self.config_filename)
        self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the resolved configuration to every logger."""
        options = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(flatten(options))
            if isinstance(
                logger, TensorBoardLogger
            ):  # its file is there already, empty, and it writes no second one
                save_hparams_to_yaml(
                    Path(logger.log_dir) / logger.NAME_HPARAMS_FILE, logger.hparams
                )
