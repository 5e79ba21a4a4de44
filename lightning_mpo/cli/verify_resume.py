"""`lightning-mpo verify-resume`: kill a run, resume it, and compare it bit for bit."""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mpo.cli.forked_runs import Runs
from lightning_mpo.errors import UserError, exit_code_of
from lightning_mpo.resume.kills import Kill, draw_kills

if TYPE_CHECKING:
    from lightning_mpo.resume.comparison import Comparison

KILLS_OF_A_RUN = 3
"""Most kills of one run."""
MOST_UPDATES, MOST_KILLS = 1_000_000, 100_000


def main(arguments: list[str]) -> int:
    """Run a configuration undisturbed, then killed and resumed; print the comparison.

    Returns:
        The exit code: 0 if the runs are equal, 1 if they differ, 2 after a mistake of the user.
    """
    parser = argparse.ArgumentParser(
        "lightning-mpo verify-resume",
        description=__doc__,
        usage="%(prog)s -c CONFIG [-c CONFIG ...] [options]",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--updates", type=int, default=6, help="updates per run (default: 6)")
    parser.add_argument(
        "--kill",
        metavar="PHASE:N",
        help="the event to kill at (default: the update after the middle)",
    )
    parser.add_argument(
        "--kills", type=int, help="number of kills, at random events and times, up to 3 in one run"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random kills (default: 0)")
    parser.add_argument("--folder", help="folder of the runs (default: a temporary one)")
    return exit_code_of(lambda: _verify(*parser.parse_known_args(arguments)))


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    """Verify one kill or several, as the options say."""
    check_updates(options.updates)
    # one kill at a chosen event
    if options.kills is None:
        kill = f"update:{options.updates // 2 + 1}" if options.kill is None else options.kill
        return verify(rest, options.updates, kill, options.folder)
    # kills at random
    if options.kill is not None:
        raise UserError(
            "`--kill` names one event and `--kills` draws them at random: give one of the two"
        )
    if not 1 <= options.kills <= MOST_KILLS:
        raise UserError(f"`--kills` must be from 1 to {MOST_KILLS:,}, got {options.kills}")
    folder = _new_folder(options.folder, "whole")
    with Runs(rest, options.updates) as runs:
        return verify_often(runs, options.kills, options.seed, folder)


def verify(arguments: list[str], updates: int, kill: str, folder: str | None) -> int:
    """Run undisturbed, killed and continued, each as a separate process, and compare the results.

    Args:
        arguments: of the command line, without a verb.
        updates: updates of a run.
        kill: `PHASE:N`.
        folder: folder of the runs; None: a temporary one.

    Returns:
        0 if the runs are equal, 1 if they differ.

    Raises:
        UserError: the kill is not an event of the run, or a run fails.
    """
    from lightning_mpo.callbacks import KillAt  # takes seconds

    check_updates(updates)
    KillAt.from_text(kill)
    runs_folder = _new_folder(folder, "whole", "killed")
    with Runs(arguments, updates) as runs:
        runs.run("undisturbed", runs_folder / "whole")
        phase, _, count = kill.partition(":")
        if not runs.run("killed", runs_folder / "killed", Kill(phase, int(count))):
            raise UserError(
                f"the run ended before the kill at {kill!r}: give a smaller number, or more "
                "`--updates`"
            )
        runs.run("continued", runs_folder / "killed")
        return report(runs, runs_folder, kill)


def report(runs: Runs, folder: Path, kill: str) -> int:
    """Print the comparison after one kill; return 1 if the runs differ.

    Args:
        runs: runs of the configuration.
        folder: folder of the runs.
        kill: `PHASE:N`.
    """
    from lightning_mpo.resume.comparison import compare_runs

    # a line for each part of a checkpoint
    parts = compare_runs(folder / "whole", folder / "killed")
    width = max(len(part.part) for part in parts)
    for part in parts:
        verdict = "differs" if part.difference else "bit for bit"
        print(f"{part.part:{width}s}  {part.count:6d} values  {verdict}")
    # the first difference, and its probable cause
    first = _first_difference(parts)
    if first is None:
        print(f"a run killed at {kill} goes on as if it had not been")
        return 0
    print(f"first difference: {first}")
    explain(runs, folder)
    return 1


def _first_difference(parts: Sequence[Comparison]) -> str | None:
    return next((part.difference for part in parts if part.difference), None)


def explain(runs: Runs, folder: Path) -> None:
    """Print whether two undisturbed runs are equal; if not, the resume is not the cause.

    Args:
        runs: runs of the configuration.
        folder: folder of the runs.
    """
    from lightning_mpo.resume.comparison import compare_runs

    runs.run("again", folder / "again", quiet=True)
    first = _first_difference(compare_runs(folder / "whole", folder / "again"))
    print(
        f"two undisturbed runs differ as well ({first}): look for a reward or a kernel that does "
        "not repeat itself; OMP_NUM_THREADS=1 or MKL_CBWR=COMPATIBLE may help"
        if first
        else "two undisturbed runs are the same bit for bit: the difference comes from the resume"
    )


def verify_often(runs: Runs, kills: int, seed: int, folder: Path) -> int:
    """Kill runs at random events and times, and compare each run with the undisturbed one.

    Args:
        runs: runs of the configuration.
        kills: number of kills.
        seed: seed of the random kills.
        folder: folder of the runs.

    Returns:
        0 if all runs are equal, 1 if one differs.

    Raises:
        UserError: a run fails.
    """
    generator, remaining, different, trial = random.Random(seed), kills, 0, 0
    runs.run("undisturbed", folder / "whole")
    from lightning_mpo.resume.comparison import compare_runs

    while remaining:
        # kill a run up to three times; it may end before a kill
        trial += 1
        run = folder / f"killed-{trial}"
        done: list[Kill] = []
        most = min(remaining, generator.randint(1, KILLS_OF_A_RUN))
        for kill in draw_kills(generator, most, runs.events(folder / "whole"), runs.seconds):
            if not runs.run("killed", run, kill, quiet=True):
                break
            done.append(kill)
        else:
            runs.run("continued", run, quiet=True)
        remaining -= len(done)
        # compare it
        first = _first_difference(compare_runs(folder / "whole", run))
        different += first is not None
        print(
            f"run {trial:3d}  {', '.join(map(str, done)) or 'no kill':40s}  "
            f"{first or 'bit for bit'}",
            flush=True,
        )
    # sum up
    if different:
        explain(runs, folder)
    verdict = f"{different} runs differ" if different else "all went on bit for bit"
    print(f"{kills} kills in {trial} runs: {verdict}")
    return int(different > 0)


def check_updates(updates: int) -> None:
    """Refuse a run without an update after a kill, and a run that is too long.

    Raises:
        UserError: `updates` is below 2 or above `MOST_UPDATES`.
    """
    if not 2 <= updates <= MOST_UPDATES:
        raise UserError(f"`--updates` must be from 2 to {MOST_UPDATES:,}, got {updates}")


def _new_folder(name: str | None, *runs: str) -> Path:
    """Make the folder of the runs.

    Args:
        name: of the folder; None: a temporary one.
        runs: names of the runs, which the folder must not hold yet.
    """
    if name is not None and not name.strip():
        raise UserError("`--folder` needs the name of a folder")
    folder = Path(name) if name is not None else Path(tempfile.mkdtemp(prefix="verify-resume-"))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`--folder` {str(folder)!r} is a file: give a folder")
    if any((folder / run).exists() for run in runs):
        raise UserError(
            f"`--folder` {str(folder)!r} holds runs of an earlier verification: give another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder
