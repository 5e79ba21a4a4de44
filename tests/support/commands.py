"""Configuration files that a test of the command line writes."""

from __future__ import annotations

from pathlib import Path

import yaml


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path
