"""LightningCLI, with the repairs that training from configuration files needs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_mpo.modules  # noqa: F401  short class names are found among imported classes
from lightning_mpo.callbacks import (
    Heartbeat,
    HeldOutAnswers,
    Predictions,
    RolloutLoop,
    RolloutProgressBar,
)
from lightning_mpo.cli.nulls import check_nulls, nulls_as_files
from lightning_mpo.cli.option_checks import (
    check_numbers,
    check_options,
    check_sections,
    holds_enum,
)
from lightning_mpo.cli.save_config import SaveConfig
from lightning_mpo.cli.settings import (
    ORDERS,
    PARSER_OPTIONS,
    SHOW_ORDER,
    resolve_references_within_verbs,
)
from lightning_mpo.cli.verbs import TRAINER_VERBS
from lightning_mpo.cli.warmup_stage import check_before_stage, fit_first
from lightning_mpo.errors import UserError
from lightning_mpo.modules.monitors import check_callbacks
from lightning_mpo.modules.parallel import check_alone, check_nodes
from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.quiet import NOTES
from lightning_mpo.recipes import expand
from lightning_mpo.recipes.tree import value_at
from lightning_mpo.resume.checkpoints import find_checkpoint
from lightning_mpo.rewards.resolving import blame
from lightning_mpo.storage import locate, unfinished_mark

OPTIONS: dict[str, Any] = {
    "model_class": L.LightningModule,
    "datamodule_class": L.LightningDataModule,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "auto_configure_optimizers": False,
    "seed_everything_default": 0,
    "save_config_callback": SaveConfig,
    "save_config_kwargs": {"overwrite": True},
    "parser_kwargs": PARSER_OPTIONS,
}
"""Arguments of `LightningCLI` for every verb that reads configuration files."""


class CLI(LightningCLI):
    """Adds the `rollout:` section, `include:` and `warmup:`.

    The command line wins over the hyper-parameters in a checkpoint.
    """

    starts_processes = True
    """Whether the trainer starts the processes of a run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        words = kwargs.get("args")
        words = sys.argv[1:] if words is None else words
        self._verb = words[0] if isinstance(words, Sequence) and words else None
        self._show_order = False
        self._fit_stage: Callable[[], None] | None = None
        """Fits the warm-up stage, if its checkpoint is missing."""
        super().__init__(*args, **kwargs)

    @property
    def trains(self) -> bool:
        """Whether the run trains, so that a missing checkpoint of a warm-up stage is made first."""
        return self.subcommand == "fit"

    # --- the parser -------------------------------------------------------------------------------

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Accept complete names of options only: new options may make abbreviations ambiguous."""
        resolve_references_within_verbs()
        return super().init_parser(**kwargs | {"allow_abbrev": False})

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning
        """Return this command line's verb alone: a parser of each takes a tenth of a second."""
        verbs = super().subcommands()
        return {self._verb: verbs[self._verb]} if self._verb in verbs else verbs

    def _add_instantiators(self) -> None:
        """Keep the configuration out of `save_hyperparameters`; `SaveConfig` logs it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RolloutLoop, "rollout")
        parser.set_defaults({"rollout.reward_process": True})
        parser.add_argument(
            "--include",
            type=list[str] | str | None,
            help="files that are read before this one; this one wins over them",
        )
        if self._verb == "predict":
            parser.add_argument("--show-order", action="store_true", help=SHOW_ORDER)
        parser.add_argument(
            "--warmup",
            type=str | None,
            help="configuration of the stage that makes `policy.checkpoint`; it is fitted first "
            "if that file is missing",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Replace names of recipes by their files, with the files that these include in front."""
        if isinstance(args, dict | Namespace):
            if value_at(args, "include") or any(
                value_at(args, verb, "include") for verb in TRAINER_VERBS
            ):
                raise UserError(
                    '`include` works in files only; give arguments as a list: ["fit", "-c", FILE]'
                )
            super().parse_arguments(parser, args)
        else:
            words = expand(sys.argv[1:] if args is None else args)
            self.config = parser.parse_args(nulls_as_files(words))

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it is.

        Lightning's method would let the hyper-parameters of a checkpoint win over it silently.
        """

    # --- checks before a model is loaded ----------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        config.pop("include", None)
        self._show_order = config.pop("show_order", False)
        # refuse mistakes that would appear late or never
        check_sections(config)
        check_numbers(config)
        check_nulls(config)
        if holds_enum(config):  # YAML has no form for some defaults of Lightning; this raises
            self.parser.dump(self.config)
        check_options(config, self.subcommand, self.trains)
        # options that the verb sets
        if self.subcommand:
            config["weights_only"] = True  # torch's default depends on an environment variable
        if self.subcommand == "predict":
            # predictions are written batch by batch, as memory may not hold all
            config["return_predictions"] = False
            # a logger of files would delete the metrics of the run that made the weights
            config["trainer"]["logger"] = False
        _replace_csv_logger(config)
        _remove_bars(config)
        # the warm-up stage, if its checkpoint is missing
        warmup = config.pop("warmup", None)
        checkpoint = value_at(config, "model", "init_args", "policy", "init_args", "checkpoint")
        if (
            warmup
            and checkpoint
            and (not locate(checkpoint).exists() or unfinished_mark(checkpoint).exists())
        ):
            self.plan_stage(config, warmup, checkpoint)

    def plan_stage(self, config: Any, warmup: str, checkpoint: str) -> None:
        """Plan to fit the warm-up stage, which makes the missing `policy.checkpoint`, before the run.

        Args:
            config: the configuration, which subclasses may change instead.
            warmup: the configuration of the stage.
            checkpoint: the file.
        """
        if self.trains:
            self._fit_stage = partial(fit_first, warmup, checkpoint, config.get("seed_everything"))

    # --- objects ----------------------------------------------------------------------------------

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
        # our own progress bar: Lightning's counts epochs, which a run of rollouts does not have
        configured = options["callbacks"] or []
        parts: list[L.Callback] = (
            [configured] if isinstance(configured, L.Callback) else list(configured)
        )
        wants_bar = options["enable_progress_bar"] is not False and not options["barebones"]
        if wants_bar and not any(isinstance(part, ProgressBar) for part in parts):
            parts.append(RolloutProgressBar())
        trainer = super().instantiate_trainer(**{"callbacks": parts} | kwargs)
        callbacks = callbacks_of(trainer)
        # write predictions, which would otherwise be lost
        if self.subcommand == "predict":
            if not any(isinstance(callback, Predictions) for callback in callbacks):
                callbacks.append(Predictions())
            _show_orders(callbacks, self._show_order)
        # write answers to held-out problems
        evaluates = self.subcommand in ("validate", "test")
        if evaluates and not any(isinstance(part, HeldOutAnswers) for part in callbacks):
            callbacks.append(HeldOutAnswers())
        # several processes: they wait for each other from here on
        if self.starts_processes:
            check_alone(trainer)
            check_nodes(trainer)
        if trainer.world_size > 1:
            NOTES.show()
        if (
            self.trains
            and trainer.world_size > 1
            and not any(isinstance(callback, Heartbeat) for callback in callbacks)
        ):
            callbacks.insert(0, Heartbeat())  # reports a process that waits for another
        return trainer

    def before_fit(self) -> None:
        """Find the checkpoint `last`, and refuse one that the run cannot continue.

        This comes before a model is loaded for it.
        """
        # some callbacks fail in their own set-up, which comes before the module's
        if self.trains:
            check_callbacks(self.trainer, self.model)
        # the warm-up stage takes minutes: mistakes of the run itself come first
        if self._fit_stage is not None:
            check_before_stage(self.trainer, self.model, self.datamodule)
            self._fit_stage()
        options = self.config_init[self.subcommand]
        options["ckpt_path"] = find_checkpoint(
            self.trainer,
            self.model,
            options.get("ckpt_path"),
            stage=str(self.subcommand),
            data=self.datamodule,
        )
        # a resumed run writes into the folder of the run before
        if options["ckpt_path"] is not None:
            warnings.filterwarnings(
                "ignore", message="Checkpoint directory .* exists and is not empty"
            )

    before_validate = before_test = before_predict = before_fit


def _show_orders(callbacks: Sequence[L.Callback], show: bool) -> None:
    """Let predictions print the order of their first completions, if the command line says so."""
    for callback in callbacks:
        if isinstance(callback, Predictions) and show:
            callback.show_order = callback.show_order or ORDERS


def _replace_csv_logger(config: Any) -> None:
    """Put `MetricsCSV` in place of Lightning's `CSVLogger`, which deletes a resumed run's file."""
    loggers = value_at(config, "trainer", "logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if value_at(logger, "class_path") == "lightning.pytorch.loggers.CSVLogger":
            logger["class_path"] = "lightning_mpo.resume.metrics_csv.MetricsCSV"


def _remove_bars(config: Any) -> None:
    """Remove a recipe's progress bars if `enable_progress_bar: false`; Lightning refuses both."""
    callbacks = value_at(config, "trainer", "callbacks")
    if value_at(config, "trainer", "enable_progress_bar") is False and isinstance(callbacks, list):
        config["trainer"]["callbacks"] = [
            callback
            for callback in callbacks
            if not str(value_at(callback, "class_path")).endswith("ProgressBar")
        ]
