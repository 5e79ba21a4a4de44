"""Module, data and trainer of a configuration, with nothing loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from jsonargparse import set_parsing_settings

from lightning_mpo.cli.parser import CLI, OPTIONS


class PlanCLI(CLI):
    """Does without a checkpoint that a warm-up has yet to make: weights of other values take no other memory."""

    starts = False

    def without_warmup(self, config: Any, warmup: str, checkpoint: str) -> None:
        config["model"]["init_args"]["policy"]["init_args"]["checkpoint"] = None


def build(arguments: Sequence[str]) -> tuple[Any, Any, L.Trainer]:
    """Instantiate module, data and trainer of a configuration; nothing is loaded."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    cli = PlanCLI(**OPTIONS | {"save_config_callback": None, "args": list(arguments), "run": False})
    return cli.model, cli.datamodule, cli.trainer
