"""Calls of the verbs that write and read an export, and the completions of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from lightning_mpo import cli
from lightning_mpo.cli import export as export_command

EXPORTED = ["--model", "out", "--data", "prompts.jsonl", "--accelerator", "cpu"]


def run_or_export(monkeypatch) -> Callable[..., int]:
    """Return a function that runs a verb; an export gets the configuration of the run."""

    def call(verb: str, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["lightning-mpo", verb, *map(str, arguments)])
        given = sys.argv[2:]
        if verb == "export":
            return export_command.main(
                [*given, *(() if "-c" in given else ("-c", "run/config.yaml"))]
            )
        return cli.run()

    return call


def predicted(folder: str = ".") -> list[dict]:
    lines = (Path(folder) / "completions" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
