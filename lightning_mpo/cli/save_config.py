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
from lightning_mpo.modules.trainer import is_fast_dev_run
from lightning_mpo.quiet import NOTES
from lightning_mpo.resume.checkpoints import last_path
from lightning_mpo.storage.lock import FolderLock


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` when training begins.

    A run that is refused before does not overwrite the file of the run before it.
    """

    _locks: tuple[FolderLock, ...] = ()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lock the run's folders, so that a second run in them is refused.

        Other verbs may read the folders.
        """
        if stage != "fit" or not trainer.is_global_zero or self._locks:
            return
        if is_fast_dev_run(trainer):
            return
        # the folders of checkpoints and of the logger
        paths = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        folders = {Path(path) for path in paths if path}
        if trainer.loggers and isinstance(trainer.loggers[0], CSVLogger | TensorBoardLogger):
            log_folder = Path(trainer.loggers[0].log_dir)
            folders.add(log_folder)
            self._refuse_folders(log_folder)
        for folder in sorted({folder.resolve() for folder in folders}):
            self._locks = (*self._locks, FolderLock(folder))

    def _refuse_folders(self, folder: Path) -> None:
        """Refuse a folder in the place of a file that the run writes."""
        for name in (self.config_filename, "metrics.csv", "hparams.yaml"):
            path = folder / name
            if path.is_dir():
                raise UserError(
                    f"{str(path)!r} is a folder, and the run writes a file of that name: move it "
                    "away, or give the logger another `save_dir`"
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
        folder = Path(
            trainer.log_dir or trainer.default_root_dir
        )  # a collective: before the return
        if not trainer.is_global_zero:
            return
        # other loggers have one `save_dir` for all runs, so the folder of checkpoints is taken
        if trainer.loggers and not isinstance(trainer.loggers[0], CSVLogger | TensorBoardLogger):
            folder = last_path(trainer).parent
            folder = folder.parent if folder.name == "checkpoints" else folder
        # write under another name first: a run that is killed here leaves the old file as it was
        options = self.parser.dump(self.config, skip_none=False)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{self.config_filename}.part"
        part.write_text(options)
        part.replace(folder / self.config_filename)
        self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Pass the resolved configuration to every logger."""
        options = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(flatten(options))
            # TensorBoard's logger has written an empty file already, and writes no second one
            if isinstance(logger, TensorBoardLogger):
                save_hparams_to_yaml(
                    Path(logger.log_dir) / logger.NAME_HPARAMS_FILE, logger.hparams
                )
