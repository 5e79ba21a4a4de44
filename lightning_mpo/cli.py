"""LightningCLI, with the repairs that training from configuration files needs."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

import lightning_mpo.modules  # noqa: F401  short class names are found among imported classes
from lightning_mpo.callbacks import (
    ExactResume,
    Heartbeat,
    Predictions,
    Preemption,
    Rollout,
    RolloutProgressBar,
)
from lightning_mpo.callbacks.checkpoints import last_path, settle_checkpoint
from lightning_mpo.callbacks.preemption import SIGNALS, STAGE_CODE, Preempted
from lightning_mpo.errors import UserError
from lightning_mpo.hyperparameters import flatten
from lightning_mpo.messages import one_line, suggest
from lightning_mpo.mistakes import explain
from lightning_mpo.modules.monitors import check_callbacks
from lightning_mpo.modules.parallel import check_alone, check_nodes, check_strategy_options
from lightning_mpo.modules.trainer_options import check_trainer_options, check_training
from lightning_mpo.quiet import NOTES, leave_noise_out
from lightning_mpo.recipes import expand, find
from lightning_mpo.rewards.functions import blame
from lightning_mpo.storage import locate, read_checkpoint, unfinished_mark
from lightning_mpo.storage.lock import FolderLock

EARLY = 75
"""Exit code of a warm-up stage that was asked to go, and saved (EX_TEMPFAIL of sysexits.h)."""
TRAINER_VERBS = ("fit", "validate", "test", "predict")
VERBS = (*TRAINER_VERBS, "export", "configs", "methods", "plan", "verify-resume")
"""What `lightning-mpo` can be asked for; those behind `predict` are answered elsewhere."""


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
        for path in (folder / name for name in (self.config_filename, "metrics.csv", "hparams.yaml")):
            if path.is_dir():
                raise UserError(
                    f"{str(path)!r} is a folder, and the run writes a file of that name: move it away, or give the logger "
                    "another `save_dir`"
                )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for lock in reversed(self._locks):
            lock.release()
        self._locks = ()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
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
            folder = last_path(trainer).parent  # the `save_dir` of such a logger belongs to all its runs
            folder = folder.parent if folder.name == "checkpoints" else folder
        options = self.parser.dump(self.config, skip_none=False)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{self.config_filename}.part"  # a run that is stopped here leaves the file as it was
        part.write_text(options)
        part.replace(folder / self.config_filename)
        self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the resolved configuration to every logger."""
        options = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            logger.log_hyperparams(flatten(options))
            if isinstance(logger, TensorBoardLogger):  # its file is there already, empty, and it writes no second one
                save_hparams_to_yaml(Path(logger.log_dir) / logger.NAME_HPARAMS_FILE, logger.hparams)


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
        parser.add_lightning_class_args(Rollout, "rollout")
        parser.set_defaults({"rollout.reward_process": True})
        parser.add_argument(
            "--include", type=list[str] | str | None, help="files that this one overlays (expanded beforehand)"
        )
        parser.add_argument(
            "--warmup",
            type=str | None,
            help="configuration of a stage that makes `policy.checkpoint`, fitted first where that file is missing",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Find recipes by name and put in front what files `include:`, whoever gives the arguments."""
        if isinstance(args, dict | Namespace):
            if _nested(args, "include") or any(_nested(args, verb, "include") for verb in TRAINER_VERBS):
                raise UserError('`include` stands in files; give the arguments as a list: ["fit", "-c", FILE]')
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
                raise UserError(f"`{section}` must be a mapping of options, got {config.get(section)!r}")
        _check_numbers(config)
        if _holds_enum(config):  # some defaults of Lightning's are members that YAML has no form for
            self.parser.dump(self.config)
        check_trainer_options(config["trainer"])
        if self.fits:
            check_training(config["trainer"])
        check_strategy_options(config["trainer"])
        _check_checkpoint(config.get("ckpt_path"))
        if self.subcommand:
            if config.get("weights_only") is False:
                raise UserError("`weights_only: false` would run code that a checkpoint names; leave it out")
            config["weights_only"] = True  # the default is torch's, which a variable of the environment changes
        if self.subcommand == "predict":
            config["return_predictions"] = False  # they are written batch by batch, and may be more than memory holds
            config["trainer"]["logger"] = (
                False  # one of files would delete the metrics of the run that made the weights
            )
        _take_own_classes(config)
        _leave_bars_out(config)
        warmup = config.pop("warmup", None)
        checkpoint = _nested(config, "model", "init_args", "policy", "init_args", "checkpoint")
        if warmup and checkpoint and (not locate(checkpoint).exists() or unfinished_mark(checkpoint).exists()):
            self.without_warmup(config, warmup, checkpoint)

    def without_warmup(self, config: Any, warmup: str, checkpoint: str) -> None:
        """Fit the stage that makes `policy.checkpoint`, which is missing."""
        if self.fits:
            _fit_first(warmup, checkpoint, config.get("seed_everything"))

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
            parts.append(RolloutProgressBar())  # Lightning's own counts epochs that a run does not have
        trainer = super().instantiate_trainer(**{"callbacks": parts} | kwargs)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.subcommand == "predict" and not any(isinstance(callback, Predictions) for callback in callbacks):
            callbacks.append(Predictions())  # what is sampled would be lost
        if self.starts:
            check_alone(trainer)
            check_nodes(trainer)
        if trainer.world_size > 1:
            NOTES.show()  # processes wait for each other from here on, and say so
        if self.fits and trainer.world_size > 1 and not any(isinstance(callback, Heartbeat) for callback in callbacks):
            callbacks.insert(0, Heartbeat())  # a process that waits for another says nothing by itself
        return trainer

    def before_fit(self) -> None:
        """Find `last`, and refuse a checkpoint that the run cannot go on from, before a model is loaded for it."""
        if self.fits:
            check_callbacks(self.trainer, self.model)  # some fail in their own set-up, which comes before the module's
        options = self.config_init[self.subcommand]
        options["ckpt_path"] = settle_checkpoint(
            self.trainer, self.model, options.get("ckpt_path"), stage=str(self.subcommand), data=self.datamodule
        )
        if options["ckpt_path"] is not None:  # a run that goes on writes where it wrote before
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")

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
            logger["class_path"] = "lightning_mpo.callbacks.MetricsCSV"


def _leave_bars_out(config: Any) -> None:
    """Let `enable_progress_bar: false` win over the bars of a recipe, where Lightning refuses both."""
    callbacks = _nested(config, "trainer", "callbacks")
    if _nested(config, "trainer", "enable_progress_bar") is False and isinstance(callbacks, list):
        kept = [part for part in callbacks if not str(_nested(part, "class_path")).endswith("ProgressBar")]
        config["trainer"]["callbacks"] = kept


def _check_checkpoint(path: str | None) -> None:
    """Refuse a checkpoint that cannot be read before a model is loaded for it."""
    if path is None or path == "last":
        return
    if not Path(path).name or path in ("best", "hpc", "registry") or path.startswith("registry:"):
        raise UserError(f"`ckpt_path` must be `last` or a checkpoint file, got {path!r}: name the file itself")
    read_checkpoint(path, "`ckpt_path`", part="outline")


def _fit_first(config: str, checkpoint: str, seed: Any) -> None:
    """Run the stage that makes a checkpoint, as a process of its own; one that was stopped before goes on."""
    if int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"`policy.checkpoint` {checkpoint!r} is missing; make it first: lightning-mpo fit -c {config}")
    find(config, place="`warmup`: ")
    path, mark = locate(checkpoint), unfinished_mark(checkpoint)
    state = "unfinished" if path.exists() else "missing"
    print(f"warm-up    {checkpoint} is {state}: fitting {config} first", flush=True)
    command = [sys.executable, "-m", "lightning_mpo", "fit", "-c", config]
    command += ["--seed_everything", str(seed)] if seed is not None else []
    command += ["--ckpt_path", checkpoint] if path.exists() else []
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    code = _run_stage(command)
    if code == EARLY:
        print(f"warm-up    {config} was stopped; the same command goes on with it", flush=True)
        raise Preempted
    if code:
        advice = f"; to begin it afresh, delete {checkpoint}" if path.exists() else ""
        raise UserError(f"the warm-up stage {config!r} failed with exit code {code}{advice}")
    mark.unlink(missing_ok=True)
    if not path.exists():
        raise UserError(f"the warm-up stage {config!r} did not write `policy.checkpoint` {checkpoint!r}")


def _run_stage(command: list[str]) -> int:
    """Run a process that is stopped with this one, and return its exit code: `EARLY` if it was asked to go."""
    process = subprocess.Popen(command, env=os.environ | {STAGE_CODE: str(EARLY)})
    passed: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        passed.append(number)
        process.send_signal(number)

    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in SIGNALS} if here else {}
    try:
        code = process.wait()
    except KeyboardInterrupt:  # of a terminal, which interrupts the stage as well
        try:
            process.wait(10)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return EARLY if passed and code == -passed[0] else code


def _nested(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if config is not None and hasattr(config, "get") else None
    return config


def run(arguments: Sequence[object] | None = None) -> int:
    """Run a command line, of this process or as given; a mistake of the user's prints one line and returns 2.

    Args:
        arguments: such as `["fit", "-c", "quickstart"]`; None: those of the process.

    Returns:
        the exit code.
    """
    from lightning_mpo.__main__ import import_from_here, main

    words = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    import_from_here()
    if not words or words[0] not in VERBS:
        verb = words[0] if words else ""
        return _fail(f"no verb {verb!r}{suggest(verb, VERBS) or '; there are ' + ', '.join(VERBS)}")
    if words[0] not in TRAINER_VERBS or words[:2] == ["predict", "--model"]:
        return main(words)
    own = {"args": words, "trainer_defaults": {"callbacks": [ExactResume(), Preemption()]}}
    return guarded(lambda: CLI(**OPTIONS | own))


def guarded(call: Callable[[], object]) -> int:
    """Call something that parses a command line; a mistake of the user's prints one line and returns 2, not 0."""
    leave_noise_out()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # `${seed_everything}` under `fit` as well
    NOTES.hold()
    try:
        call()
    except UserError as error:
        NOTES.drop()
        return _fail_everywhere(error) if error.everywhere else _fail(str(error))
    except SystemExit as error:
        name = _exiting_module(error)
        if name is None:
            raise
        NOTES.drop()
        return _fail(f"module `{name}` cannot be imported: it calls `sys.exit` where it is imported; take that out")
    except Exception as error:
        line = _mistake(error)
        if line is None:
            raise
        NOTES.drop()
        return _fail(line)
    finally:
        NOTES.show()
    return 0


def _fail_everywhere(error: UserError) -> int:
    """End this process of several, which all fail: the first prints, and ends before those that it started."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        return _fail(str(error))
    deadline = time.monotonic() + 60
    while error.launcher == os.getppid() and time.monotonic() < deadline:
        time.sleep(0.1)
    return 2


def _exiting_module(error: SystemExit) -> str | None:
    """Return the module whose import ended in `sys.exit`, if that is where an exit comes from."""
    name, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "<module>":
            name = str(trace.tb_frame.f_globals.get("__name__"))
        trace = trace.tb_next
    return name


def _mistake(error: Exception) -> str | None:
    """Return the line for a mistake of the user's; None for anything else."""
    if isinstance(error, ArgumentError):
        return one_line(str(error))
    if isinstance(error, OmegaConfBaseException):
        verb, _, key = str(error.full_key).partition(".")
        return f"`{key if verb in VERBS else error.full_key}`: {str(error.msg).splitlines()[0]}"
    return explain(error)


def _fail(message: str) -> int:
    print(f"lightning-mpo: {message}", file=sys.stderr)
    return 2
