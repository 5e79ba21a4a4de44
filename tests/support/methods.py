"""An algorithm file with its header, and the command that prints the table of methods."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from lightning_mpo.__main__ import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "algorithm"
HEADER = """\
# Mine: clipped tokens.
# Another line on what it is.
# paper: arXiv:2402.03300 [P]
# values: low = high = 0.2 [C; TRL];
#   coef = 3e-4 [I]; no KL [S]
# confidence: [C] read
"""
OBJECTIVE = {
    "support": "FullVocabulary",
    "surrogate": {
        "class_path": "ClippedRatio",
        "init_args": {"low": 0.2, "high": 0.2, "dual": None},
    },
    "kl": None,
    "upkeep": {"coef": 0.0003},
}


def write(path: Path, header: str = HEADER, objective: Any = OBJECTIVE) -> Path:
    path.write_text(
        header + yaml.safe_dump({"model": {"init_args": {"objective": objective}}}, sort_keys=False)
    )
    return path


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lightning-mpo", "methods", *map(str, arguments)])
    return main()
