"""Module, data and trainer of a configuration, without loading a model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L

from lightning_mpo.cli.parser import CLI, OPTIONS


class PlanCLI(CLI):
    """Needs no checkpoint of a warm-up stage: other values of the weights take the same memory."""

    starts_processes = False

    def plan_stage(self, config: Any, warmup: str, checkpoint: str) -> None:
        config["model"]["init_args"]["policy"]["init_args"]["checkpoint"] = None


class RewardsCLI(PlanCLI):
    """Needs no GPU either, as rewards run on the CPU."""

    def before_instantiate_classes(self) -> None:
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
        for name, value in here.items():
            self.config["trainer"][name] = value
        super().before_instantiate_classes()


def build(arguments: Sequence[str], cli: type[PlanCLI] = PlanCLI) -> tuple[Any, Any, L.Trainer]:
    """Return module, data and trainer of a configuration.

    Args:
        arguments: of the command line, without a verb.
        cli: reads them.
    """
    parts = cli(**OPTIONS | {"save_config_callback": None, "args": list(arguments), "run": False})
    return parts.model, parts.datamodule, parts.trainer


@contextmanager
def without_notes() -> Iterator[None]:
    """Leave out warnings, and Lightning's notes on devices: nothing is trained."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore")
            yield
    finally:
        logger.setLevel(level)
