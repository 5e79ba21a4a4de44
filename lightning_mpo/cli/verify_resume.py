"""`lightning-mpo verify-resume`: kill a run of a configuration, resume it, and compare it bit for bit."""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from lightning_mpo.cli.forked_runs import Runs
from lightning_mpo.errors import UserError, plainly
from lightning_mpo.resume.kills import Kill, draw_kills

MOST = 3
"""Most kills of one run."""
MOST_UPDATES, MOST_KILLS = 1_000_000, 100_000


def main(arguments: list[str]) -> int:
    """Run a configuration undisturbed, then killed and resumed; print the comparison.

    Returns:
        0: all is the same; 1: something differs; 2: a mistake of the user.
    """
    parser = argparse.ArgumentParser(
        "lightning-mpo verify-resume",
        description=__doc__,
        usage="%(prog)s -c CONFIG [-c CONFIG ...] [options]",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--updates", type=int, default=6, help="updates of a run (default: 6)")
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
    return plainly(lambda: _verify(*parser.parse_known_args(arguments)))


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    check_updates(options.updates)
    if options.kills is None:
        kill = f"update:{options.updates // 2 + 1}" if options.kill is None else options.kill
        return verify(rest, options.updates, kill, options.folder)
    if options.kill is not None:
        raise UserError(
            "`--kill` names one event and `--kills` draws them at random: give one of the two"
        )
    if not 1 <= options.kills <= MOST_KILLS:
        raise UserError(f"`--kills` must be from 1 to {MOST_KILLS:,}, got {options.kills}")
    made = _new_folder(options.folder, "whole")
    with Runs(rest, options.updates) as runs:
        return verify_often(runs, options.kills, options.seed, made)


def verify(arguments: list[str], updates: int, kill: str, folder: str | None) -> int:
    """Make the runs, each as a separate process, and compare their results.

    Args:
        arguments: of the command line, for `fit`.
        updates: updates of a run.
        kill: `PHASE:N`.
        folder: folder of the runs; None: a temporary one.

    Returns:
        0: all is the same; 1: something differs.

    Raises:
        UserError: the kill is not an event of the run, or a run fails.
    """
    from lightning_mpo.callbacks import KillAt  # takes seconds

    check_updates(updates)
    KillAt.from_text(kill)
    made = _new_folder(folder, "whole", "killed")
    with Runs(arguments, updates) as runs:
        runs.run("undisturbed", made / "whole")
        phase, _, count = kill.partition(":")
        if not runs.run("killed", made / "killed", Kill(phase, int(count))):
            raise UserError(
                f"the run ended before the kill at {kill!r}: give a smaller number, or more `--updates`"
            )
        runs.run("continued", made / "killed")
        return report(runs, made, kill)


def report(runs: Runs, made: Path, kill: str) -> int:
    """Print the comparison after one kill; return 1 if something differs."""
    from lightning_mpo.resume.comparison import compare_runs

    parts = compare_runs(made / "whole", made / "killed")
    width = max(len(part.part) for part in parts)
    for part in parts:
        print(
            f"{part.part:{width}s}  {part.count:6d} values  {'differs' if part.difference else 'bit for bit'}"
        )
    first = next((part.difference for part in parts if part.difference), None)
    print(
        f"first difference: {first}"
        if first
        else f"a run killed at {kill} goes on as if it had not been"
    )
    if first:
        explain(runs, made)
    return int(first is not None)


def explain(runs: Runs, made: Path) -> None:
    """Print whether two undisturbed runs are equal; if not, the resume is not the cause of a difference."""
    from lightning_mpo.resume.comparison import compare_runs

    runs.run("again", made / "again", quiet=True)
    first = next(
        (
            part.difference
            for part in compare_runs(made / "whole", made / "again")
            if part.difference
        ),
        None,
    )
    print(
        f"two undisturbed runs differ as well ({first}): look for a reward or a kernel that does not repeat itself; "
        "OMP_NUM_THREADS=1 or MKL_CBWR=COMPATIBLE may help"
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
        0: all is the same; 1: something differs.

    Raises:
        UserError: a run fails.
    """
    draw, left, bad, trial = random.Random(seed), kills, 0, 0
    runs.run("undisturbed", folder / "whole")
    from lightning_mpo.resume.comparison import compare_runs

    while left:
        trial += 1
        run, done = folder / f"killed-{trial}", []
        for kill in draw_kills(
            draw, min(left, draw.randint(1, MOST)), runs.events(folder / "whole"), runs.seconds
        ):
            if not runs.run("killed", run, kill, quiet=True):
                break
            done.append(kill)
        else:
            runs.run("continued", run, quiet=True)
        left -= len(done)
        first = next(
            (part.difference for part in compare_runs(folder / "whole", run) if part.difference),
            None,
        )
        bad += first is not None
        print(
            f"run {trial:3d}  {', '.join(map(str, done)) or 'no kill':40s}  {first or 'bit for bit'}",
            flush=True,
        )
    if bad:
        explain(runs, folder)
    print(
        f"{kills} kills in {trial} runs: "
        + (f"{bad} runs differ" if bad else "all went on bit for bit")
    )
    return int(bad > 0)


def check_updates(updates: int) -> None:
    """Refuse a run with no update after a kill, and one without an end.

    Raises:
        UserError: `updates` is below 2 or above `MOST_UPDATES`.
    """
    if not 2 <= updates <= MOST_UPDATES:
        raise UserError(f"`--updates` must be from 2 to {MOST_UPDATES:,}, got {updates}")


def _new_folder(folder: str | None, *names: str) -> Path:
    if folder is not None and not folder.strip():
        raise UserError("`--folder` needs the name of a folder")
    made = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="verify-resume-"))
    if made.exists() and not made.is_dir():
        raise UserError(f"`--folder` {str(made)!r} is a file: give a folder")
    if any((made / name).exists() for name in names):
        raise UserError(
            f"`--folder` {str(made)!r} holds runs of an earlier verification: give another folder"
        )
    made.mkdir(parents=True, exist_ok=True)
    return made
