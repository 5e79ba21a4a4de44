"""LightningCLI, with the repairs that training from configuration files needs."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_mpo.modules  # noqa: F401  short class names are found among imported classes
from lightning_mpo.callbacks import Heartbeat, Predictions, RolloutLoop, RolloutProgressBar
from lightning_mpo.cli.save_config import SaveConfig
from lightning_mpo.cli.verbs import TRAINER_VERBS
from lightning_mpo.cli.warmup_stage import fit_first
from lightning_mpo.errors import UserError
from lightning_mpo.modules.monitors import check_callbacks
from lightning_mpo.modules.parallel import check_alone, check_nodes, check_strategy_options
from lightning_mpo.modules.trainer_options import check_trainer_options, check_training
from lightning_mpo.quiet import NOTES
from lightning_mpo.recipes import expand
from lightning_mpo.resume.checkpoints import settle_checkpoint
from lightning_mpo.rewards.functions import blame
from lightning_mpo.storage import locate, read_checkpoint, unfinished_mark

OPTIONS: dict[str, Any] = {
    "model_class": L.LightningModule,
    "datamodule_class": L.LightningDataModule,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "auto_configure_optimizers": False,
    "seed_everything_default": 0,
    "save_config_callback": SaveConfig,
    "save_config_kwargs": {"overwrite": True},
    "parser_kwargs": {"parser_mode": "omegaconf+", "exit_on_error": False},
}
"""Of every command line that reads configuration files."""


class CLI(LightningCLI):
    """Adds the `rollout:` section, `include:` and `warmup:`; the command line wins over checkpoints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        words = kwargs.get("args")
        words = sys.argv[1:] if words is None else words
        self._verb = words[0] if isinstance(words, Sequence) and words else None
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Take whole names of options only: a shortened one would be another option after a release."""
        return super().init_parser(**kwargs | {"allow_abbrev": False})

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning
        """Return the verb of this command line alone: a parser of each takes a tenth of a second."""
        verbs = super().subcommands()
        return {self._verb: verbs[self._verb]} if self._verb in verbs else verbs

    def _add_instantiators(self) -> None:
        """Leave out a second copy of the configuration for `save_hyperparameters`: `SaveConfig` gives it to loggers."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RolloutLoop, "rollout")
        parser.set_defaults({"rollout.reward_process": True})
        parser.add_argument(
            "--include",
            type=list[str] | str | None,
            help="files that this one overlays (expanded beforehand)",
        )
        parser.add_argument(
            "--warmup",
            type=str | None,
            help="configuration of a stage that makes `policy.checkpoint`, fitted first where that file is missing",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Find recipes by name and put in front what files `include:`, whoever gives the arguments."""
        if isinstance(args, dict | Namespace):
            if _nested(args, "include") or any(
                _nested(args, verb, "include") for verb in TRAINER_VERBS
            ):
                raise UserError(
                    '`include` stands in files; give the arguments as a list: ["fit", "-c", FILE]'
                )
            super().parse_arguments(parser, args)
        else:
            self.config = parser.parse_args(expand(sys.argv[1:] if args is None else args))

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: Lightning's version lets a checkpoint's hyper-parameters beat it silently."""

    starts = True
    """Whether the processes of a run are started."""

    @property
    def fits(self) -> bool:
        """Whether a warm-up stage is fitted first where its checkpoint is missing."""
        return self.subcommand == "fit"

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        config.pop("include", None)
        for section in ("trainer", "rollout"):
            if not isinstance(config.get(section), Namespace):
                raise UserError(
                    f"`{section}` must be a mapping of options, got {config.get(section)!r}"
                )
        _check_numbers(config)
        if _holds_enum(
            config
        ):  # some defaults of Lightning's are members that YAML has no form for
            self.parser.dump(self.config)
        check_trainer_options(config["trainer"])
        if self.fits:
            check_training(config["trainer"])
        check_strategy_options(config["trainer"])
        _check_checkpoint(config.get("ckpt_path"))
        if self.subcommand:
            if config.get("weights_only") is False:
                raise UserError(
                    "`weights_only: false` would run code that a checkpoint names; leave it out"
                )
            config["weights_only"] = (
                True  # the default is torch's, which a variable of the environment changes
            )
        if self.subcommand == "predict":
            config["return_predictions"] = (
                False  # they are written batch by batch, and may be more than memory holds
            )
            config["trainer"]["logger"] = (
                False  # one of files would delete the metrics of the run that made the weights
            )
        _take_own_classes(config)
        _leave_bars_out(config)
        warmup = config.pop("warmup", None)
        checkpoint = _nested(config, "model", "init_args", "policy", "init_args", "checkpoint")
        if (
            warmup
            and checkpoint
            and (not locate(checkpoint).exists() or unfinished_mark(checkpoint).exists())
        ):
            self.without_warmup(config, warmup, checkpoint)

    def without_warmup(self, config: Any, warmup: str, checkpoint: str) -> None:
        """Fit the stage that makes `policy.checkpoint`, which is missing."""
        if self.fits:
            fit_first(warmup, checkpoint, config.get("seed_everything"))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except BaseException as error:
            blamed = blame(error)
            if blamed is None:
                raise
            raise blamed from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        verb = self.config_init[self.subcommand] if self.subcommand else self.config_init
        options = verb["trainer"]
        given = options["callbacks"] or []
        parts: list[L.Callback] = [given] if isinstance(given, L.Callback) else list(given)
        bars = options["enable_progress_bar"] is not False and not options["barebones"]
        if bars and not any(isinstance(part, ProgressBar) for part in parts):
            parts.append(
                RolloutProgressBar()
            )  # Lightning's own counts epochs that a run does not have
        trainer = super().instantiate_trainer(**{"callbacks": parts} | kwargs)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.subcommand == "predict" and not any(
            isinstance(callback, Predictions) for callback in callbacks
        ):
            callbacks.append(Predictions())  # what is sampled would be lost
        if self.starts:
            check_alone(trainer)
            check_nodes(trainer)
        if trainer.world_size > 1:
            NOTES.show()  # processes wait for each other from here on, and say so
        if (
            self.fits
            and trainer.world_size > 1
            and not any(isinstance(callback, Heartbeat) for callback in callbacks)
        ):
            callbacks.insert(
                0, Heartbeat()
            )  # a process that waits for another says nothing by itself
        return trainer

    def before_fit(self) -> None:
        """Find `last`, and refuse a checkpoint that the run cannot go on from, before a model is loaded for it."""
        if self.fits:
            check_callbacks(
                self.trainer, self.model
            )  # some fail in their own set-up, which comes before the module's
        options = self.config_init[self.subcommand]
        options["ckpt_path"] = settle_checkpoint(
            self.trainer,
            self.model,
            options.get("ckpt_path"),
            stage=str(self.subcommand),
            data=self.datamodule,
        )
        if options["ckpt_path"] is not None:  # a run that goes on writes where it wrote before
            warnings.filterwarnings(
                "ignore", message="Checkpoint directory .* exists and is not empty"
            )

    before_validate = before_test = before_predict = before_fit


def _check_numbers(config: Any, path: str = "") -> None:
    """Refuse a number that is none, wherever it stands: no option takes it, and it spreads into the weights."""
    if isinstance(config, float) and math.isnan(config):
        raise UserError(f"`{path}` is .nan, which is no number")
    if isinstance(config, list | tuple):
        for i, value in enumerate(config):
            _check_numbers(value, f"{path}[{i}]")
    elif isinstance(config, dict | Namespace):
        for key, value in vars(config).items() if isinstance(config, Namespace) else config.items():
            _check_numbers(value, path if key == "init_args" else f"{path}.{key}".lstrip("."))


def _holds_enum(config: Any) -> bool:
    """Return whether any value is a member of an `Enum`."""
    if isinstance(config, list | tuple | dict | Namespace):
        values = config if isinstance(config, list | tuple) else config.values()
        return any(_holds_enum(value) for value in values)
    return isinstance(config, Enum)


def _take_own_classes(config: Any) -> None:
    """Put `MetricsCSV` where Lightning's `CSVLogger` is named, which deletes the file of a run that goes on."""
    loggers = _nested(config, "trainer", "logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if _nested(logger, "class_path") == "lightning.pytorch.loggers.CSVLogger":
            logger["class_path"] = "lightning_mpo.resume.metrics_csv.MetricsCSV"


def _leave_bars_out(config: Any) -> None:
    """Let `enable_progress_bar: false` win over the bars of a recipe, where Lightning refuses both."""
    callbacks = _nested(config, "trainer", "callbacks")
    if _nested(config, "trainer", "enable_progress_bar") is False and isinstance(callbacks, list):
        kept = [
            part
            for part in callbacks
            if not str(_nested(part, "class_path")).endswith("ProgressBar")
        ]
        config["trainer"]["callbacks"] = kept


def _check_checkpoint(path: str | None) -> None:
    """Refuse a checkpoint that cannot be read before a model is loaded for it."""
    if path is None or path == "last":
        return
    if not Path(path).name or path in ("best", "hpc", "registry") or path.startswith("registry:"):
        raise UserError(
            f"`ckpt_path` must be `last` or a checkpoint file, got {path!r}: name the file itself"
        )
    read_checkpoint(path, "`ckpt_path`", part="outline")


def _nested(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if config is not None and hasattr(config, "get") else None
    return config
