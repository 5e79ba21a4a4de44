"""Module, data and trainer of a configuration, without loading a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from lightning_mpo.cli.parser import CLI, OPTIONS


class PlanCLI(CLI):
    """Needs no checkpoint of a warm-up stage: other values of the weights take the same memory."""

    starts_processes = False

    def plan_stage(self, config: Any, warmup: str, checkpoint: str) -> None:
        config["model"]["init_args"]["policy"]["init_args"]["checkpoint"] = None


def build(arguments: Sequence[str]) -> tuple[Any, Any, L.Trainer]:
    """Return module, data and trainer of a configuration.

    Args:
        arguments: of the command line, without a verb.
    """
    cli = PlanCLI(**OPTIONS | {"save_config_callback": None, "args": list(arguments), "run": False})
    return cli.model, cli.datamodule, cli.trainer
