"""The configuration files of the repository and their names."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))
