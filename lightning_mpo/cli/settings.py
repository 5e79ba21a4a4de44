"""Settings of every parser that reads configuration files."""

from __future__ import annotations

from typing import Any

from jsonargparse import set_parsing_settings

PARSER_OPTIONS: dict[str, Any] = {"parser_mode": "omegaconf+", "exit_on_error": False}
"""`omegaconf+` resolves references such as `${rollout.max_new_tokens}`; mistakes are raised."""

ORDERS = 4
"""Completions whose order `predict --show-order` prints."""
SHOW_ORDER = f"print the order in which a masked policy revealed the first {ORDERS} completions"


def resolve_references_within_verbs() -> None:
    """Let `${seed_everything}` mean the option of the same verb, such as `fit.seed_everything`."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
