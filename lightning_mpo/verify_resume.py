"""`lightning-mpo verify-resume`: a run of one's own configuration is killed, goes on, and is compared bit for bit."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mpo.errors import UserError

if TYPE_CHECKING:
    from lightning_mpo.callbacks import KillAt

DROPPED = ("ModelCheckpoint", "Report", "RolloutProgressBar", "TQDMProgressBar", "RichProgressBar")
"""Callbacks that a verification leaves out: it saves by itself, and the others take time or a terminal."""


def main(arguments: list[str]) -> int:
    """Run a configuration undisturbed, and killed and continued; print what was compared.

    Returns:
        0 where everything is the same, 1 where something differs, 2 for a mistake of the user's.
    """
    parser = argparse.ArgumentParser(
        "lightning-mpo verify-resume", description=__doc__, usage="%(prog)s -c CONFIG [-c CONFIG ...] [options]"
    )
    parser.add_argument("--updates", type=int, default=6, help="updates of a run (default: 6)")
    parser.add_argument("--kill", metavar="PHASE:N", help="the event to die at (default: the update behind the middle)")
    parser.add_argument("--folder", help="where the runs go (default: a temporary folder)")
    options, rest = parser.parse_known_args(arguments)
    try:
        return verify(rest, options.updates, options.kill or f"update:{options.updates // 2 + 1}", options.folder)
    except UserError as error:
        print(f"lightning-mpo: {error}", file=sys.stderr)
        return 2


def verify(arguments: list[str], updates: int, kill: str, folder: str | None) -> int:
    """Make the runs, each as a process of its own, and compare what they left.

    Raises:
        UserError: the kill is no event of the run, or a run fails.
    """
    if updates < 2:
        raise UserError(f"`--updates` must be at least 2, got {updates}")
    killer(kill)
    made = Path(folder) if folder else Path(tempfile.mkdtemp(prefix="verify-resume-"))
    whole, killed = made / "whole", made / "killed"
    for run in (whole, killed):
        if run.exists():
            raise UserError(f"`--folder` {str(made)!r} holds runs of a verification before: give another one")
        run.mkdir(parents=True)
    _run("undisturbed", whole, "none", updates, arguments)
    _run("killed", killed, kill, updates, arguments)
    _run("continued", killed, "none", updates, arguments)
    from lightning_mpo.modules.comparison import compare_runs

    found = compare_runs(whole, killed)
    width = max(len(part.part) for part in found)
    for part in found:
        print(f"{part.part:{width}s}  {part.count:6d} values  {'differs' if part.difference else 'bit for bit'}")
    first = next((part.difference for part in found if part.difference), None)
    print(f"first difference: {first}" if first else f"a run killed at {kill} goes on as if it had not been")
    return int(first is not None)


def _run(name: str, folder: Path, kill: str, updates: int, arguments: list[str]) -> None:
    """Run once, with the output in a file; die or finish as is expected."""
    command = [sys.executable, "-m", "lightning_mpo.verify_resume", str(folder), kill, str(updates), *arguments]
    log, started = Path(f"{folder}-{name}.log"), time.perf_counter()
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status == 0 and kill != "none":
        raise UserError(f"the run ended before the kill at {kill!r}: give a smaller number, or more `--updates`")
    if status == 2:  # the run has said it in one line
        raise UserError(log.read_text().strip().rsplit("lightning-mpo: ", 1)[-1].splitlines()[0])
    if status != (0 if kill == "none" else -9):
        raise UserError(f"the {name} run failed with exit code {status}; its output is in {log}")
    print(
        f"{name:11s}  {updates} updates, {time.perf_counter() - started:.0f} s"
        + ("" if kill == "none" else f", {kill}")
    )


def child() -> int:
    """Run a configuration in a folder: `python -m lightning_mpo.verify_resume FOLDER KILL UPDATES ARGUMENTS`."""
    folder, kill, updates, *arguments = sys.argv[1:]
    from lightning_mpo import cli

    return cli.guarded(lambda: _fit(Path(folder), kill, int(updates), arguments))


def _fit(folder: Path, kill: str, updates: int, arguments: list[str]) -> None:
    from jsonargparse import Namespace
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_mpo import cli
    from lightning_mpo.callbacks import ExactResume, PromptOrder
    from lightning_mpo.storage import locate

    class VerifyCLI(cli.CLI):
        """Sends what a run writes to the folder."""

        fits = True

        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            trainer = self.config["trainer"]
            trainer["default_root_dir"] = str(folder)
            place = Namespace(save_dir=str(folder), name="", version="")
            trainer["logger"] = [Namespace(class_path="lightning_mpo.callbacks.MetricsCSV", init_args=place)]
            kept = [c for c in trainer["callbacks"] or [] if c["class_path"].rsplit(".", 1)[-1] not in DROPPED]
            trainer["callbacks"] = kept
            trainer["enable_progress_bar"] = trainer["enable_model_summary"] = False
            if trainer["limit_val_batches"] != 0:
                trainer["limit_val_batches"], trainer["check_val_every_n_epoch"] = 1, None
                trainer["val_check_interval"] = max(1, updates // 3)

    save = ModelCheckpoint(
        folder / "checkpoints", save_last=True, save_top_k=0, every_n_train_steps=1, enable_version_counter=False
    )
    own = [PromptOrder(), ExactResume(), *([killer(kill)] if kill != "none" else []), save]
    made = VerifyCLI(
        **cli.OPTIONS
        | {"trainer_defaults": {"callbacks": own}, "save_config_callback": None, "run": False}
        | {"args": [*arguments, "--trainer.max_steps", str(updates)]}
    )
    last = folder / "checkpoints" / "last.ckpt"
    made.trainer.fit(made.model, datamodule=made.datamodule, ckpt_path=str(last) if locate(last).exists() else None)


def killer(kill: str) -> KillAt:
    """Return the callback behind `PHASE:N`.

    Raises:
        UserError: it is no such pair.
    """
    from lightning_mpo.callbacks import KillAt
    from lightning_mpo.callbacks.kill import PHASES

    phase, _, count = kill.partition(":")
    if phase not in PHASES or not count.isdigit() or int(count) < 1:
        raise UserError(f"`--kill` must be one of {', '.join(PHASES)} and a number, such as update:4, got {kill!r}")
    return KillAt(phase, int(count))


if __name__ == "__main__":
    sys.exit(child())
